"""Where the records of a JSON or JSONL file lie, found without parsing or holding any of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Spans = NDArray[np.uint64]
"""(records, 2): first byte and number of bytes."""

_QUOTE, _BACKSLASH, _COMMA, _NEWLINE, _SPACE = b'"\\,\n '
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_LINES = "Name it .jsonl if it holds one record per line."
_TOLD = _STEP != 0
_TOLD[[_QUOTE, _COMMA]] = True
_BLANK = b" \t\r\n\xef\xbb\xbf"  # and the mark that some editors put first


def line_spans(pieces: Iterable[bytes]) -> Spans:
    """Every line that is not blank."""
    found: list[Spans] = []
    start = base = 0
    blank = True  # what there is so far of the line that began at `start`
    for piece in pieces:
        values = np.frombuffer(piece, np.uint8)
        ends = np.flatnonzero(values == _NEWLINE) + 1
        bounds = np.concatenate(([0], ends))
        if len(ends):
            kept = np.ones(len(ends), bool)
            # a line that does not begin with a space or a line break is not blank
            for line in np.flatnonzero(values[bounds[:-1]] <= _SPACE):
                kept[line] = not piece[bounds[line] : ends[line]].isspace()
            kept[0] |= not blank
            spans = np.stack([bounds[:-1] + base, np.diff(bounds)], 1)
            spans[0] = start, base + ends[0] - start
            found.append(spans[kept].astype(np.uint64))
            start, blank = base + int(ends[-1]), True
        blank = blank and not piece[int(bounds[-1]) :].strip()
        base += len(piece)
    if not blank:
        found.append(np.array([[start, base - start]], np.uint64))
    return np.concatenate(found) if found else np.zeros((0, 2), np.uint64)


@dataclass
class _Scan:
    """Where a scan of a JSON array stands. Depth 1 is inside the array, outside its elements."""

    base: int = 0
    depth: int = 0
    in_string: bool = False
    first: int | None = None
    """Byte after the array's opening bracket."""
    last: int | None = None
    """Byte of its closing bracket."""
    commas: list[NDArray[np.int64]] = field(default_factory=list)


def array_spans(pieces: Iterable[bytes], where: str) -> Spans:
    """Every element of the JSON array that `pieces` make up.

    Only brackets, commas and strings are looked at; elements are not validated. Raises
    `ValueError`, naming `where`, if it is no array, or if its end is missing.
    """
    scan = _Scan()
    for piece in _whole_escapes(pieces):
        _look_for_start(scan, piece, where)
        _scan_piece(scan, np.frombuffer(piece, np.uint8), where)
        scan.base += len(piece)
    if scan.base == 0 or scan.first is None:
        raise ValueError(f"{where}: the file holds no record.")
    if scan.last is None:
        count = sum(map(len, scan.commas))
        raise ValueError(
            f"{where}: not valid JSON: the file ends in the middle of record {count}. "
            "It is incomplete: copy or download it again."
        )
    bounds = np.concatenate([[scan.first - 1], *scan.commas, [scan.last]])
    return np.stack([bounds[:-1] + 1, np.diff(bounds) - 1], 1).astype(np.uint64)


def _whole_escapes(pieces: Iterable[bytes]) -> Iterable[bytes]:
    """The same bytes, cut so that no piece ends in a backslash, which would escape the next."""
    kept = b""
    for piece in pieces:
        piece = kept + piece
        kept = piece[len(piece.rstrip(b"\\")) :]
        if piece := piece[: len(piece) - len(kept)]:
            yield piece
    if kept:
        yield kept


def _look_for_start(scan: _Scan, piece: bytes, where: str) -> None:
    """The first byte that is not blank must open an array (or an object, which is told apart)."""
    if scan.first is not None:
        return
    if text := piece.lstrip(_BLANK):
        if text[:1] not in (b"[", b"{"):
            raise ValueError(f"{where}: not valid JSON: it begins with {text[:1]!r}, not with [.")
        scan.first = scan.base + len(piece) - len(text) + 1


def _scan_piece(scan: _Scan, values: NDArray[np.uint8], where: str) -> None:
    at = np.flatnonzero(_TOLD[values])
    kinds = values[at]
    quotes = kinds == _QUOTE
    quotes &= ~_escaped(values, at)
    before = np.cumsum(quotes) + scan.in_string
    scan.in_string = bool(before[-1] % 2) if len(before) else scan.in_string
    outside = (before % 2 == 0) & (kinds != _QUOTE)
    at, kinds = at[outside], kinds[outside]
    depth = scan.depth + np.cumsum(_STEP[kinds], dtype=np.int64)
    scan.depth = int(depth[-1]) if len(depth) else scan.depth
    closed = np.flatnonzero(depth == 0)
    end = int(at[closed[0]]) if len(closed) and scan.last is None else None
    if end is not None and values[end] != ord("]"):
        raise ValueError(f"{where}: expected a list of records, got an object. {_LINES}")
    if scan.last is not None or end is not None:
        _check_end(values[0 if end is None else end + 1 :], where)
    if end is not None:
        scan.last = scan.base + end
    scan.commas.append(at[(kinds == _COMMA) & (depth == 1)] + scan.base)


def _check_end(rest: NDArray[np.uint8], where: str) -> None:
    if (rest > _SPACE).any():
        raise ValueError(f"{where}: not valid JSON: there is more after the list. {_LINES}")


def _escaped(values: NDArray[np.uint8], at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the bytes `at` follow an odd number of backslashes."""
    result = np.zeros(len(at), bool)
    looked = np.flatnonzero((at > 0) & (values[at - 1] == _BACKSLASH))
    before = at[looked] - 1
    while len(looked):  # once for every backslash in the longest row of them
        result[looked] = ~result[looked]
        more = (before > 0) & (values[before - 1] == _BACKSLASH)
        looked, before = looked[more], before[more] - 1
    return result
