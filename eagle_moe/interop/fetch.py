"""From what a person writes for weights to files on this machine: a path, or a Hub repository."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download

from eagle_moe.experts import ExpertSpec

PRETRAINED = "pretrained"
"""Stands for the checkpoint on an expert's card."""

CONFIGS = ("config.json", "open_clip_config.json")
"""What says how the weights in the same folder are to be used."""

_HUB = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?(:\s*(?P<file>\S+))?")


def is_hub_id(place: str) -> bool:
    """Whether `place` reads as `owner/name[@revision][: file]`; a path that is there does not."""
    return not Path(place).exists() and _HUB.fullmatch(place) is not None


def named_place(spec: ExpertSpec, place: str | Path) -> str:
    """`place`, or what `pretrained` stands for. Raises `ValueError` if that is nothing."""
    if str(place) != PRETRAINED:
        return str(place)
    if not spec.card.checkpoint:
        raise ValueError(
            f"expert `{spec.name}`: its card names no checkpoint that `{PRETRAINED}` could stand "
            "for. Give a file, a folder or a Hub id."
        )
    return spec.card.checkpoint


def fetch(spec: ExpertSpec, place: str | Path, stems: Sequence[str]) -> Path:
    """The file or folder that `place` means for the expert `spec`, downloaded if need be.

    `place`: a path, `pretrained`, or `owner/name[@revision][: file]` on the Hub. Of a repository
    the first of `stems` (names of weight files, see `open_shards`) that it has is downloaded, and
    the configurations beside it; never code. Raises `ValueError` in one line.
    """
    name = named_place(spec, place)
    if Path(name).exists():
        return Path(name)
    found = _HUB.fullmatch(name)
    if found is None:
        means = f" (`{PRETRAINED}`)" if name != str(place) else ""
        raise ValueError(
            f"expert `{spec.name}`: {name}{means}: no such file or folder, nor is it a Hub id. "
            "If it is an address, download it and give the file."
        )
    repo, revision, file = found["repo"], found["revision"], found["file"]
    if file:
        folder = _download(repo, revision, (*CONFIGS, f"*{file}"))
        match = next(folder.rglob(Path(file).name), None)
        if match is None:
            raise ValueError(f"{repo}: the Hub has no file {file} in it.")
        return match
    for stem in stems:
        folder = _download(repo, revision, (*CONFIGS, *_patterns(stem)))
        if any((folder / name).is_file() for name in (stem, f"{stem}.index.json")):
            return folder
    raise ValueError(f"{repo}: the Hub has none of {', '.join(stems)} in it.")


def _patterns(stem: str) -> list[str]:
    """The weights called `stem`, whole or in shards."""
    name, dot, ending = stem.rpartition(".")
    return [stem, f"{stem}.index.json", f"{name}-*{dot}{ending}"]


@cache
def _download(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder with the files of `repo` that match `patterns`, of the cache or the network.

    Asked once per process, which thus sees one state of the repository.
    """
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        cause = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"{repo}: no such path here, and it cannot be had from the Hub ({cause}). "
            "Without a network, download it elsewhere and give the folder."
        ) from None
