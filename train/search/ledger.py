"""`ledger.jsonl`: one line for every trial that has ended. Lines are only ever added.

A line is on the disk before the search goes on, and a line that a kill has torn does not count: so
a search that is started again knows exactly which trials have ended. Only the driver writes.

    key        hash of all that determines the result (`train.search.stages`)
    members, seed, budget                        the trial
    status     "done" or "failed"
    score      mean over tasks of the mean over items; null if it failed
    items      task -> score of each item
    error, log                                   why it failed, and where to read more
    steps, seconds, stages                       of all its stages, shared or not
    cost       parameters, FLOPs and images/s of the mixture
    search, code                                 hash of the search's settings, version of the code
    started, finished                            dates
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEDGER = "ledger.jsonl"


class Ledger:
    """The rows in `path` by key; of several with one key, the last. One writer at a time."""

    def __init__(self, path: Path) -> None:
        """Raises `ValueError` naming a line that is damaged, but for one torn at the end."""
        self.path = path
        raw = path.read_bytes() if path.is_file() else b""
        whole, newline, _ = raw.rpartition(b"\n")  # what follows was torn by a kill
        self._whole = len(whole) + len(newline)
        self.rows = [_parse(line, f"{path}:{n}") for n, line in _numbered(whole)]
        self.by_key = {row["key"]: row for row in self.rows}

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; it is on the disk when this returns."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.ftruncate(descriptor, self._whole)  # over what a kill has torn
            os.pwrite(descriptor, line, self._whole)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._whole += len(line)
        self.rows.append(row)
        self.by_key[row["key"]] = row


def _numbered(lines: bytes) -> Iterator[tuple[int, bytes]]:
    return enumerate(lines.split(b"\n") if lines else (), start=1)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or "key" not in row:
        raise ValueError(
            f"{where}: not a line of a ledger. Restore the file from a copy, or remove the line: "
            "its trial is then run again."
        )
    return row
