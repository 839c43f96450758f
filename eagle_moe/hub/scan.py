"""What must not be published: secrets, local paths, names of machines, files that do not belong.

Every text file is read line by line, gzip files unpacked; of safetensors the header's metadata, of
pictures their texts. Nothing is ever unpickled. A secret is reported by its first characters only.
"""

from __future__ import annotations

import getpass
import gzip
import io
import json
import re
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECRETS = {
    "a token of the Hugging Face Hub": r"\bhf_[A-Za-z0-9]{30,}\b",
    "an API key (sk-...)": r"(?<![\w-])sk-(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[A-Za-z0-9][\w-]{19,}",
    "an access key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})",
    "a token of GitLab": r"\bglpat-[\w-]{20,}",
    "a token of Slack": r"\bxox[abprs]-[\w-]{10,}",
    "an API key of Google": r"\bAIza[\w-]{35}\b",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a signed token (JWT)": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a bearer token": r"(?i)\bbearer\s+(?=[\w.~+/-]*\d)[\w.~+/-]{20,}",
    "a password or key": r"(?i)(?:api[_-]?key|secret[_-]?key|client_secret|access_token|passwo?r?d)"
    r"[\"']?\s*[:=]\s*[\"']?(?=[\w+/.-]*\d)(?=[\w+/.-]*[A-Za-z])[\w+/.-]{12,}",
    "a password in an address": r"\b[a-z][a-z0-9+]*://[^\s/:@\"']+:[^\s/:@\"']+@",
}
"""What -> pattern, from the forms that their issuers document."""

ROOTS = (
    "home|Users|root|tmp|mnt|media|scratch|data|workspace|gpfs|lustre|nfs|private/var|var/folders"
)
LOCAL_PATH = re.compile(
    r"(?:(?<=file://)|(?<![\w.:/~}\-]))/(?:" + ROOTS + r")/[^\s\"'`<>|,;:()\[\]{}]+"
    r"|(?<![A-Za-z])[A-Za-z]:(?:\\{1,2}|/)(?:Users|Documents and Settings)(?:\\{1,2}|/)[^\"'\s]+"
)
"""A path below a folder where people and clusters keep their own files. An address on the web is
none, nor is a path in a container's root such as `/usr/lib`."""

VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}
"""Their entries are pieces of text from the world, of which some look like paths."""

PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth", ".npz"}
BINARY = {".gif", ".gz", ".ico", ".jpeg", ".jpg", ".model", ".png", ".safetensors", ".webp"}
"""Endings of files that are no text and belong into a release."""
STRAY = {
    "a file of credentials": r"(^|/)(\.env(\..*)?|\.netrc|\.git-credentials|id_(rsa|ed25519))$",
    "state of a training run": r"(^|/)(optimizer|scheduler|rng_state|training_args|random_states)"
    r"[\w-]*\.|(^|/)(global_step\d+|checkpoint-\d+)/|(^|/)zero_pp_rank_|\.distcp$",
    "a log": r"(^|/)(logs|wandb)/|events\.out\.tfevents|\.log$",
    "a leftover of another program": r"(^|/)(__pycache__|\.git|\.cache|\.ipynb_checkpoints)/"
    r"|(^|/)(\.DS_Store|Thumbs\.db)$|\.(pyc|part|lock|tmp|swp|writing)$|~$",
}
_COMMON = {"localhost", "localhost.localdomain"}


@dataclass(frozen=True)
class Finding:
    """Something that must not be published; `line` is None where it is of the whole file."""

    file: str
    line: int | None
    what: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.what}"


@dataclass(frozen=True)
class Machine:
    """Names that say where a file was made: of the person's account, home folder and machine."""

    user: str = ""
    host: str = ""
    home: str = ""

    @classmethod
    def here(cls) -> Machine:
        """This one. What cannot be found out stays empty."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # an account without a name, as in some containers
            user = ""
        try:
            home = str(Path.home())
        except RuntimeError:
            home = ""
        return cls(user, socket.gethostname(), home)

    def patterns(self) -> dict[str, str]:
        """What -> pattern. A host counts alone only if its name is like nothing else."""
        found = {}
        if len(self.home.strip("/")) > 4:
            found["this account's home folder"] = re.escape(self.home) + r"(?![\w.-])"
        if self.host and self.user:
            at = rf"\b{re.escape(self.user)}@{re.escape(self.host)}\b"
            found["this account and machine"] = at
        if self.host not in _COMMON and len(self.host) > 5 and re.search(r"[\d.-]", self.host):
            found["this machine's name"] = rf"(?<![\w.-]){re.escape(self.host)}(?![\w-])"
        return found


def scan_folder(folder: str | Path, machine: Machine | None = None) -> list[Finding]:
    """Everything in `folder` that must not be published, file by file.

    `machine`: whose names are looked for (default: this one).
    """
    folder = Path(folder)
    patterns = _patterns(Machine.here() if machine is None else machine)
    found: list[Finding] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found.append(Finding(name, None, "a link: put the file itself here"))
        elif path.is_file():
            found += _scan_file(path, name, patterns)
    return found


def scan_text(text: str, name: str = "text", machine: Machine | None = None) -> list[Finding]:
    """The same for one text that is to become the file `name`."""
    return _scan_lines(
        io.StringIO(text), name, _patterns(Machine.here() if machine is None else machine)
    )


def without_local_paths(value: Any) -> Any:
    """Plain data with every local path, whole or inside a text, shortened to its last name."""
    if isinstance(value, str):
        return LOCAL_PATH.sub(lambda match: re.split(r"[\\/]", match[0].rstrip("\\/"))[-1], value)
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(item) for item in value]
    return value


def _patterns(machine: Machine) -> dict[str, re.Pattern[str]]:
    return {what: re.compile(text) for what, text in {**SECRETS, **machine.patterns()}.items()}


def _scan_file(path: Path, name: str, patterns: dict[str, re.Pattern[str]]) -> list[Finding]:
    if path.suffix.lower() in PICKLES:
        return [Finding(name, None, "may hold a pickle: releases carry safetensors")]
    stray = [Finding(name, None, what) for what, rule in STRAY.items() if re.search(rule, name)]
    if stray:
        return stray
    try:
        return _scan_content(path, name, patterns)
    except (UnicodeDecodeError, ValueError, EOFError, OSError, struct.error):
        return [Finding(name, None, "cannot be read as what its name says: remove it")]


def _scan_content(path: Path, name: str, patterns: dict[str, re.Pattern[str]]) -> list[Finding]:
    ending = path.suffix.lower()
    if ending == ".safetensors":
        return _scan_lines(io.StringIO(_metadata(path)), name, patterns, numbered=False)
    if ending == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return _scan_lines(lines, name, patterns)
    if ending in {".png", ".jpg", ".jpeg", ".gif", ".webp"}:
        return _scan_lines(io.StringIO(_picture_texts(path)), name, patterns, numbered=False)
    if ending in BINARY:
        return []
    with path.open(encoding="utf-8") as lines:
        return _scan_lines(lines, name, patterns)


def _scan_lines(
    lines: Iterable[str],
    name: str,
    patterns: dict[str, re.Pattern[str]],
    numbered: bool = True,
) -> list[Finding]:
    return [
        Finding(name, number if numbered else None, what)
        for number, line in enumerate(lines, start=1)
        for what in _findings(line, name, patterns)
    ]


def _findings(line: str, name: str, patterns: dict[str, re.Pattern[str]]) -> Iterator[str]:
    for what, pattern in patterns.items():
        if match := pattern.search(line):
            yield f"{what} ({match[0][:4]}...)"
            if "home folder" in what:
                return  # the same characters are a local path as well
    if Path(name).name not in VOCABULARIES and (match := LOCAL_PATH.search(line)):
        yield f"a local path ({match[0]})"


def _metadata(path: Path) -> str:
    """The free texts in the header of a safetensors file; raises `ValueError` if it has none."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > 100 * 2**20:  # the format's own limit
            raise ValueError("header too long")
        header = json.loads(file.read(length))
    return "\n".join(f"{key}: {value}" for key, value in header.get("__metadata__", {}).items())


def _picture_texts(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return "\n".join(f"{k}: {v}" for k, v in image.info.items() if isinstance(v, str))
