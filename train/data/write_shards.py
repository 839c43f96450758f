"""Make WebDataset shards (`train.data.shards`) of a data set.

    python -m train.data.write_shards data/train.jsonl --image-root data/pictures --out data/shards
    python -m train.data.write_shards "hub/data/train-*.parquet" --out data/shards

Sources are JSON and JSONL files with their pictures, other shards, and Parquet files with
`conversations` or `messages` in one column and pictures in another (`image` or `images`: bytes, or
`{"bytes", "path"}` as the Hub's data sets have them). Pictures are copied byte by byte.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from train.data.records import Picture
from train.data.shards import TAR, Member
from train.data.source import RecordSource

PARQUET = ".parquet"
_ROWS = 64  # rows of a Parquet file in memory at a time

Sample = tuple[dict[str, Any], list[bytes]]
"""A record, in which every picture is named by its member, and the pictures."""


def write_shards(source: str, out: str | Path, image_root: str | None, per_shard: int) -> int:
    """Write `source` as shards of `per_shard` samples into the new folder `out`; returns samples.

    A shard appears whole or not at all. Raises `ValueError` or `FileNotFoundError`, naming the
    sample, for what cannot be read.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty. Choose another folder, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    samples = _of_parquet(source) if _is_parquet(source) else _of_records(source, image_root)
    shard = count = 0
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        count += 1
        if len(batch) == per_shard:
            _write(folder / f"shard-{shard:05d}{TAR}", batch, count - len(batch))
            shard, batch = shard + 1, []
    if batch:
        _write(folder / f"shard-{shard:05d}{TAR}", batch, count - len(batch))
    return count


def _write(path: Path, samples: Sequence[Sample], first: int) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with tarfile.open(beside, "w", format=tarfile.GNU_FORMAT) as archive:
        for number, (record, pictures) in enumerate(samples, first):
            text = json.dumps(record, ensure_ascii=False).encode()
            members = [("json", text), *zip(record.get("images", []), pictures, strict=True)]
            for name, data in members:
                header = tarfile.TarInfo(f"{number:09d}.{name}")
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
    beside.replace(path)


def _of_records(path: str, image_root: str | None) -> Iterator[Sample]:
    source = RecordSource(path, missing_placeholder="prepend")
    root = Path(image_root) if image_root is not None else source.path.parent
    console = Console(stderr=True)
    shown = track(range(len(source)), "shards", console=console, disable=not console.is_terminal)
    for index in shown:
        record = source[index]
        try:
            pictures = [_read(picture, root) for picture in record.images]
        except OSError as error:
            raise ValueError(f"{record.where}: {error}") from None
        suffixes = [Path(str(picture)).suffix or ".img" for picture in record.images]
        yield _named(source.raw(index), suffixes), pictures


def _read(picture: Picture, root: Path) -> bytes:
    return picture.read() if isinstance(picture, Member) else (root / picture).read_bytes()


def _of_parquet(path: str) -> Iterator[Sample]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError("Parquet files need pyarrow: pip install eagle-moe[train].") from error
    place = Path(path)
    pattern = f"{glob.escape(path)}/*{PARQUET}" if place.is_dir() else path
    names = sorted(glob.glob(pattern))
    if not names:
        raise FileNotFoundError(f"no such file: {path}.")
    for name in names:
        try:
            batches = parquet.ParquetFile(name).iter_batches(_ROWS)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows):
                yield _of_row(row, f"{name}: row {number}")
        except (OSError, ArrowException) as error:
            raise ValueError(
                f"{name}: cannot be read ({error}). The shard is damaged or incomplete: copy or "
                "download it again."
            ) from None


def _of_row(row: dict[str, Any], where: str) -> Sample:
    field = "images" if "images" in row else "image"
    value = row.pop(field, None)
    cells = [] if value is None else value if isinstance(value, list) else [value]
    pictures: list[bytes] = []
    for cell in cells:
        picture = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(picture, bytes):
            raise ValueError(f"{where}: `{field}` holds no bytes of a picture, but {cell!r:.80}.")
        pictures.append(picture)
    record = {key: value for key, value in row.items() if value is not None}
    return _named(record, [_suffix(picture, where) for picture in pictures]), pictures


def _suffix(picture: bytes, where: str) -> str:
    try:
        kind = Image.open(io.BytesIO(picture)).format
    except OSError as error:
        raise ValueError(f"{where}: its picture cannot be read ({error}).") from None
    return f".{str(kind).lower()}"


def _named(raw: dict[str, Any], suffixes: Sequence[str]) -> dict[str, Any]:
    """The record with the names that its pictures have as members, in order."""
    names = [f"{number}{suffix.lower()}" for number, suffix in enumerate(suffixes)]
    record = {key: deepcopy(value) for key, value in raw.items() if key not in ("image", "images")}
    for turn in record.get("messages") or []:
        for item in turn["content"] if isinstance(turn.get("content"), list) else []:
            if item.get("type") == "image":
                item.pop("path", None)
                item.pop("image", None)
    return {**record, "images": names} if names else record


def _is_parquet(source: str) -> bool:
    place = Path(source)
    return source.endswith(PARQUET) or (place.is_dir() and any(place.glob(f"*{PARQUET}")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.data.write_shards", description="Make WebDataset shards."
    )
    parser.add_argument("source", help=".json, .jsonl, shards, or Parquet files (quote a pattern)")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--image-root", help="folder of the pictures (default: that of the file)")
    parser.add_argument("--per-shard", type=int, default=2000, metavar="N", help="samples")
    told = parser.parse_args(arguments)
    try:
        count = write_shards(told.source, told.out, told.image_root, told.per_shard)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{told.out}: {count:,} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
