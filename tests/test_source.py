"""Source: records by index, with memory and time that do not grow with their number."""

import json
import multiprocessing
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from train.data.manifest import fingerprint_of
from train.data.source import RecordSource, content_of

COUNT = 2_000_000


def turns(number):
    return [{"from": "human", "value": f"q{number}"}, {"from": "gpt", "value": "a"}]


def write_lines(path, count):
    lines = (json.dumps({"id": n, "conversations": turns(n)}) for n in range(count))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def two_million(tmp_path_factory):
    """A file of two million short lines, indexed once."""
    path = tmp_path_factory.mktemp("large") / "train.jsonl"
    line = json.dumps({"conversations": turns("")}).encode()
    path.write_bytes((line + b"\n") * COUNT)
    RecordSource(path)
    return path


def memory():
    """This process's own memory in MiB, pages of files left out."""
    told = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["RssAnon"].split()[0]) / 1024


def test_two_million_records_open_at_once_in_no_memory(two_million):
    before, start = memory(), time.perf_counter()
    source = RecordSource(two_million)
    last = source[COUNT - 1]
    assert time.perf_counter() - start < 1
    assert len(source) == COUNT
    assert last.where.endswith(f'record {COUNT - 1} (id "{COUNT - 1}")')
    for index in np.random.default_rng(0).integers(0, COUNT, 2000):
        source[int(index)]
    assert memory() - before < 30


def test_two_million_records_are_not_parsed_again(two_million, tiny_processor, monkeypatch):
    """What was found out about them is known; only what was asked for is looked at."""
    from train.data import ConversationDataset, DataSpec

    first = ConversationDataset(DataSpec(path=str(two_million), limit=3000), tiny_processor, 64)
    assert first.check_records() == 3000
    again = ConversationDataset(DataSpec(path=str(two_million), limit=3000), tiny_processor, 64)
    start = time.perf_counter()
    assert again.check_records() == 0
    assert time.perf_counter() - start < 1


def test_the_content_is_hashed_once(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", 10)
    assert content_of(path) == fingerprint_of(path)
    monkeypatch.setattr("train.data.source.sha256", None)
    assert content_of(path) == fingerprint_of(path)


def test_changed_data_is_indexed_anew(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", 10)
    assert len(RecordSource(path)) == 10
    write_lines(path, 11)
    assert RecordSource(path)[10].id == "10"


def test_data_that_shrinks_under_a_run_is_noticed(tmp_path):
    source = RecordSource(write_lines(tmp_path / "a.jsonl", 10))
    os.truncate(source.path, 100)
    with pytest.raises(ValueError, match=r"a\.jsonl: shorter than when it was indexed"):
        source[9]


def test_a_damaged_index_stops_the_run_before_it_starts(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", 10)
    RecordSource(path)
    (spans,) = tmp_path.glob(".a.jsonl.index/*/spans.*.npy")
    spans.write_bytes(spans.read_bytes()[:-16])
    with pytest.raises(ValueError, match="the index is damaged. Remove the folder"):
        RecordSource(path)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_truncated_files_are_named(tmp_path, suffix):
    rows = [{"id": n, "conversations": turns(n)} for n in range(3)]
    text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    path = tmp_path / f"a.{suffix}"
    path.write_text(text[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl?: .*record 2.* (incomplete|Unterminated)"):
        list(RecordSource(path))


def _indexed(path, results):
    results.put(len(RecordSource(path)))


def test_ranks_that_start_together_share_one_index(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", 2000)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_indexed, args=(path, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    assert [results.get(timeout=30) for _ in ranks] == [2000] * 4
    for rank in ranks:
        rank.join()
    assert len([x for x in (tmp_path / ".a.jsonl.index").iterdir() if x.is_dir()]) == 1


def test_many_reads_keep_one_file_open(tmp_path):
    source = RecordSource(write_lines(tmp_path / "a.jsonl", 100))
    source[0]
    before = len(os.listdir("/proc/self/fd"))
    for index in range(100):
        source[index]
    assert len(os.listdir("/proc/self/fd")) == before
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > before
