"""The records behind one `path`: a JSON or JSONL file, or WebDataset shards; by index, any order.

    source = RecordSource("data/train.jsonl")
    source[1_234_567]  # reads and parses this record alone

Nothing is held but a map of offsets (`train.data.index`), so a process or a loader worker needs the
same memory for a thousand records as for millions.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from io import FileIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from train.data.index import Index, chunks
from train.data.records import MissingPlaceholder, Record, parse_record
from train.data.shards import TAR, Member, ShardTable, find_shards, read_shards, read_span, whole
from train.data.spans import array_spans, line_spans

_LINE_SUFFIXES = (".jsonl", ".ndjson")
_QUIET = 256 << 20
"""Bytes up to which making an index takes a second or so, and is not worth a word."""


class RecordSource:
    """The records of one file, or of the shards in a folder or pattern. Picklable.

    Opening makes the index if there is none of the data as it is. Raises `FileNotFoundError`, or
    `ValueError` for files that hold no records.
    """

    def __init__(self, path: str | Path, missing_placeholder: MissingPlaceholder = "error") -> None:
        self.path = Path(path)
        self.missing_placeholder: MissingPlaceholder = missing_placeholder
        self.files = data_files(path)
        self.index = Index(path, self.files)
        self.sharded = self.files[0].suffix == TAR
        self._file: FileIO | None = None
        self._open_index()
        if len(self) == 0:
            raise ValueError(f"{path}: the file holds no record.")

    def __len__(self) -> int:
        return len(self._first) - 1 if self.sharded else len(self._spans)

    def __getitem__(self, index: int) -> Record:
        """Record number `index` (from 0). Raises `ValueError` if it is malformed."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        raw = self.raw(index)
        members = self._pictures(index) if self.sharded else None
        return parse_record(raw, index, self._place(index), self.missing_placeholder, members)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    @property
    def content(self) -> str:
        """`sha256:<hex>` of the file, or of what is known about the content of each shard."""
        return self._about["content"]

    def raw(self, index: int) -> Any:
        """The JSON value of record `index`, not validated."""
        try:
            return json.loads(self._bytes(index))
        except ValueError as error:
            last = " The file may be incomplete." if index == len(self) - 1 else ""
            where = f"{self._place(index)}: record {index}"
            raise ValueError(f"{where}: not valid JSON: {error}.{last}") from None

    def _bytes(self, index: int) -> bytes:
        if self.sharded:
            row = self._members[int(self._first[index])]
            return read_span(self.files[int(row["shard"])], int(row["start"]), int(row["size"]))
        start, size = map(int, self._spans[index])
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        # not a memory map: pages that were read would count as this process's memory
        return whole(os.pread(self._file.fileno(), size, start), size, self.path)

    def _pictures(self, index: int) -> dict[str, Member]:
        rows = self._members[int(self._first[index]) + 1 : int(self._first[index + 1])]
        names = self._about["names"]
        return {
            names[name]: Member(str(self.files[shard]), names[name], start, size)
            for shard, name, start, size in rows.tolist()
        }

    def _place(self, index: int) -> str:
        """The file that record `index` is in."""
        if self.sharded:
            return str(self.files[int(self._members[int(self._first[index])]["shard"])])
        return str(self.path)

    def __getstate__(self) -> dict[str, Any]:
        # arrays are opened again, not copied; a worker gets the maps alone
        gone = ("_file", "_spans", "_members", "_first")
        return {key: value for key, value in self.__dict__.items() if key not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_file": None}
        self._open_arrays()

    # -- the index

    def _open_index(self) -> None:
        about = self.index.about()
        if about is None:
            with self.index.locked():
                about = self.index.about()
                if about is None:
                    about = self._make_index()
        self._about: dict[str, Any] = about
        self._open_arrays()

    def _open_arrays(self) -> None:
        if self.sharded:
            self._members, self._first = self._array("members"), self._array("first")
        else:
            self._spans = self._array("spans")

    def _array(self, name: str) -> NDArray[Any]:
        array = self.index.array(name)
        if array is None:
            raise ValueError(
                f"{self.path}: its index has no {name}, or the data changed just now. Start again; "
                "if that does not help, remove the index (a hidden folder beside the data)."
            )
        return array

    def _make_index(self) -> dict[str, Any]:
        total = sum(path.stat().st_size for path in self.files)
        with _progress(f"index of {self.path}", total) as advance:
            if self.sharded:
                table = read_shards(self.files, advance)
                arrays = {"members": table.members, "first": table.first}
                about = {"content": _content_of_shards(self.files, table), "names": table.names}
            else:
                digest = sha256()
                pieces = chunks(self.path, digest, advance)
                if self.path.suffix in _LINE_SUFFIXES:
                    spans = line_spans(pieces)
                else:
                    spans = _without_blank(array_spans(pieces, str(self.path)), self.path)
                arrays = {"spans": spans}
                about = {"content": f"sha256:{digest.hexdigest()}"}
        self.index.create(arrays, about)
        return about


def data_files(path: str | Path) -> list[Path]:
    """The files that a data set's `path` names: one JSON or JSONL file, or its shards.

    Raises `FileNotFoundError`, or `ValueError` for a file of another kind.
    """
    place = Path(path)
    if place.suffix in (*_LINE_SUFFIXES, ".json"):
        if not place.is_file():
            raise FileNotFoundError(
                f"no such file: {path}. Give a .json or .jsonl file, or shards."
            )
        return [place]
    if place.is_file() and place.suffix != TAR:
        raise ValueError(
            f"{path}: name the file .jsonl (one record per line), .json (list) or {TAR} (shard)."
        )
    return find_shards(str(path))


def content_of(path: str | Path) -> str:
    """`sha256:<hex>` of the content of a data set, read once and then known to its index."""
    return RecordSource(path).content


def _without_blank(spans: NDArray[np.uint64], path: Path) -> NDArray[np.uint64]:
    """`[]` has no element, though there is a place for one between its brackets."""
    if len(spans) == 1 and not read_span(path, int(spans[0, 0]), int(spans[0, 1])).strip():
        return spans[:0]
    return spans


def _content_of_shards(files: list[Path], table: ShardTable) -> str:
    """Of the place, size and record of every sample: pictures count by their names and sizes.

    To read all pictures of a data set at each change of it would take hours.
    """
    digest = sha256(repr(table.names).encode())
    digest.update(np.ascontiguousarray(table.members).tobytes())
    records = table.members[table.first[:-1]][["shard", "start", "size"]].tolist()
    for shard, rows in groupby(records, itemgetter(0)):
        with files[shard].open("rb") as file:
            for _, start, size in rows:
                file.seek(start)
                digest.update(file.read(size))
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on a terminal, one line elsewhere, nothing for what is done in no time."""
    console = Console(stderr=True)
    if total < _QUIET or not console.is_terminal:
        if total >= _QUIET:
            print(f"{title}: {total / 2**30:.1f} GiB, once", file=sys.stderr)
        yield lambda amount: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.update(task, advance=amount)
