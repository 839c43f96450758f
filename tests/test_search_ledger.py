"""The ledger: what was written is there, whatever is torn; nobody's mistake passes unseen."""

from __future__ import annotations

import json
import math
import os

import pytest

from train.search.ledger import Ledger


def row(key: str, **fields: object) -> dict[str, object]:
    return {"key": key, "members": ["clip"], "status": "done", "score": 0.5, "seed": 0, **fields}


@pytest.fixture
def path(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for key in ("a", "b"):
        ledger.append(row(key))
    return ledger.path


def test_rows_are_read_back_in_order(path):
    assert [each["key"] for each in Ledger(path).rows] == ["a", "b"]
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_no_file_is_an_empty_ledger(tmp_path):
    assert Ledger(tmp_path / "ledger.jsonl").rows == []


def test_of_two_rows_with_a_key_the_last_counts(path):
    Ledger(path).append(row("a", status="failed", score=None))
    again = Ledger(path)
    assert len(again.rows) == 3
    assert again.by_key["a"]["status"] == "failed"


def test_a_line_torn_anywhere_costs_that_line_alone(path):
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        torn = Ledger(path)
        assert [each["key"] for each in torn.rows] == ["a"], whole[start:end]
        torn.append(row("c"))
        assert [each["key"] for each in Ledger(path).rows] == ["a", "c"]


def test_zeros_that_a_crash_left_at_the_end_do_not_count(path):
    with path.open("ab") as file:
        file.write(b"\0" * 100)
    torn = Ledger(path)
    torn.append(row("c"))
    assert [each["key"] for each in Ledger(path).rows] == ["a", "b", "c"]


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"score": 1}', b""])
def test_a_damaged_line_is_named(path, line):
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + second)
    with pytest.raises(ValueError, match=r"ledger.jsonl:2: not a line of a ledger.*run again"):
        Ledger(path)


def test_no_number_is_written_that_json_does_not_have(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        Ledger(path).append(row("c", score=math.nan))
    assert path.read_bytes() == before


def test_a_row_is_on_the_disk_when_append_returns(path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_size))
    Ledger(path).append(row("c"))
    assert events == [path.stat().st_size]
