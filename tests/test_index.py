"""Index: of the data as it is, or none; whole, or refused; beside the data, or in the cache."""

import os
import time

import numpy as np
import pytest

from train.data.index import Index, identity


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("one\ntwo\n")
    return path


def make(path, value=1):
    index = Index(path, [path])
    index.create({"spans": np.full(4, value)}, {"records": 4})
    return index


def test_what_was_kept_is_found_again(data):
    assert Index(data, [data]).about() is None
    make(data)
    again = Index(data, [data])
    assert again.about()["records"] == 4
    assert again.array("spans").tolist() == [1] * 4
    assert isinstance(again.array("spans"), np.memmap)
    assert again.array("other") is None
    assert [path.name for path in data.parent.iterdir() if path != data] == [".train.jsonl.index"]


def test_an_array_is_replaced_whole(data):
    index = make(data)
    index.store("lengths", np.arange(3))
    index.store("lengths", np.arange(5))
    assert index.array("lengths").tolist() == [0, 1, 2, 3, 4]
    folder = next(data.parent.glob(".train.jsonl.index/*/"))
    names = sorted(path.name.split(".")[0] for path in folder.iterdir())
    assert names == ["about", "lengths", "spans"]


@pytest.mark.parametrize("how", ["longer", "same length", "touched"])
def test_an_index_older_than_its_data_is_not_read_and_goes_when_a_new_one_comes(data, how):
    old = make(data)
    if how == "touched":
        os.utime(data, ns=(1, time.time_ns()))
    else:
        status = data.stat()
        data.write_text("one\ntwo\nthree\n" if how == "longer" else "one\nTWO\n")
        os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))  # the time does not tell
    new = Index(data, [data])
    assert new.state != old.state
    assert new.about() is None
    assert new.array("spans") is None
    make(data, 2)
    assert Index(data, [data]).array("spans").tolist() == [2] * 4
    assert len(list(data.parent.glob(".train.jsonl.index/*"))) == 1


def test_a_change_within_a_large_file_is_noticed(tmp_path):
    path = tmp_path / "large.jsonl"
    path.write_bytes(bytes(3 << 20))
    status = path.stat()
    before = Index(path, [path]).state
    with path.open("r+b") as file:
        file.seek((3 << 20) - 100)
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Index(path, [path]).state != before


@pytest.mark.parametrize("how", ["cut", "changed", "empty"])
def test_a_damaged_array_is_refused_with_the_folder_to_remove(data, how):
    index = make(data)
    (path,) = data.parent.glob(".train.jsonl.index/*/spans.*.npy")
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-8], "changed": whole[:-8] + b"\x07" * 8, "empty": b""}[how])
    with pytest.raises(
        ValueError, match=r"the index is damaged. Remove the folder .*train"
    ) as error:
        index.array("spans")
    assert str(path.parent) in str(error.value)


def test_a_damaged_description_is_refused(data):
    index = make(data)
    (path,) = data.parent.glob(".train.jsonl.index/*/about.json")
    path.write_text('{"rec')
    with pytest.raises(ValueError, match="the index is damaged"):
        index.about()


def test_where_nothing_can_be_written_the_cache_takes_it(data, tmp_path, monkeypatch):
    monkeypatch.setenv("EAGLE_MOE_CACHE", str(tmp_path / "cache"))
    (data.parent / ".train.jsonl.index").write_text("a file, where the folder would be")
    make(data)
    assert Index(data, [data]).array("spans").tolist() == [1] * 4
    assert list((tmp_path / "cache/index").glob("train.jsonl-*/*/about.json"))


def test_columns_of_an_index_that_others_made_go_to_the_cache(data, tmp_path, monkeypatch):
    monkeypatch.setenv("EAGLE_MOE_CACHE", str(tmp_path / "cache"))
    make(data)
    index = Index(data, [data])
    index._homes[0].rename(tmp_path / "kept")
    index._homes = [tmp_path / "kept" / "read-only" / "..", tmp_path / "cache"]  # cannot be made
    monkeypatch.setattr("pathlib.Path.mkdir", _only_in(tmp_path / "cache"))
    index.store("lengths", np.arange(3))
    assert (tmp_path / "cache" / index.state).is_dir()
    assert index.array("lengths").tolist() == [0, 1, 2]


def _only_in(folder):
    from pathlib import Path

    make_folder = Path.mkdir

    def mkdir(self, *args, **options):
        if folder not in (self, *self.parents):
            raise PermissionError(13, "Permission denied", str(self))
        make_folder(self, *args, **options)

    return mkdir


def test_nowhere_to_write_is_told(data, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("EAGLE_MOE_CACHE", str(blocked))
    (data.parent / ".train.jsonl.index").write_text("")
    with pytest.raises(ValueError, match=r"can be written neither in .* nor in .*EAGLE_MOE_CACHE"):
        make(data)


def test_two_processes_at_once_end_with_one_index(data):
    first, second = Index(data, [data]), Index(data, [data])
    first.create({"spans": np.zeros(2)}, {})
    second.create({"spans": np.zeros(2)}, {})
    assert len(list(data.parent.glob(".train.jsonl.index/*"))) == 1


def test_a_set_of_files_is_known_by_all_of_them(tmp_path):
    paths = [tmp_path / f"{number}.tar" for number in range(3)]
    for path in paths:
        path.write_bytes(b"x" * 10_000)
    whole = Index(tmp_path, paths).state
    assert Index(tmp_path, paths[:2]).state != whole
    paths[1].write_bytes(b"x" * 9_999 + b"y")
    assert Index(tmp_path, paths).state != whole


def test_identity_tells_values_apart():
    assert identity(1, "a") == identity(1, "a")
    assert len({identity(1, "a"), identity("1", "a"), identity([1, "a"])}) == 3
