"""The doctor's manifest: which samples of which files are bad, and why.

A file is known by its content, not by its path, so that a manifest travels with the data and a
file that changed since it was examined is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from eagle_moe.schema import Schema

Fault = Literal["record", "image", "tokens", "unsupervised"]
"""What is wrong with a sample: its JSON (`<image>` count included); a picture of it; it cannot be
encoded (more image tokens than the limit, refused by the template); it has no token to learn."""


class BadSample(Schema):
    """One fault of one sample. `index` counts records of the file from 0."""

    index: int
    id: str
    fault: Fault
    reason: str


class FileReport(Schema):
    """What the doctor found in one file. `counts` are for people; the rest is read by training."""

    path: str
    fingerprint: str
    image_root: str
    records: int
    bad: list[BadSample]
    counts: dict[str, Any]


class Overlap(Schema):
    """What two files share: distinct pictures, whole samples, and pairs of ids as examples."""

    first: str
    second: str
    images: int
    samples: int
    examples: list[tuple[str, str]]


class Manifest(Schema):
    """Reports on one or several files, made by `python -m train.data.doctor`."""

    version: Literal[1] = 1
    files: list[FileReport]
    overlaps: list[Overlap] = []

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Raises `FileNotFoundError` or `ValueError` naming the file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such manifest. Write it with `python -m train.data.doctor DATA "
                f"--out {path}`."
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}.") from None
        return cls.parse(data, str(path))

    def save(self, path: str | Path) -> None:
        """Written beside and renamed into place, so that a reader never sees half of it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.dump(), indent=1, ensure_ascii=False), encoding="utf-8")
        beside.replace(path)

    def report_on(self, content: str, data: str, source: str) -> FileReport:
        """The report on data with this `content` (`RecordSource.content`).

        `data` and `source` name the data and this manifest in the `ValueError` if there is none.
        """
        for report in self.files:
            if report.fingerprint == content:
                return report
        examined = ", ".join(report.path for report in self.files)
        raise ValueError(
            f"{source}: it does not describe {data} as it is now (it describes {examined}). "
            f"Run `python -m train.data.doctor {data} --out {source}` again."
        )


def fingerprint_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256:<hex>`."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
