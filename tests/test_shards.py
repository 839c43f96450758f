"""Shards: the same samples as from files; in any order; a damaged one is named with its remedy."""

import io
import json
import pickle
import tarfile

import pytest
import torch

from train.data import ConversationDataset, DataSpec
from train.data.source import RecordSource
from train.data.write_shards import main, write_shards


@pytest.fixture
def files(tmp_path, make_image):
    """Seven records with 1, 2, 0, 1, ... pictures in files of their own."""
    folder = tmp_path / "files"
    folder.mkdir()
    rows = []
    for number in range(7):
        count = (1, 2, 0)[number % 3]
        names = [f"p{number}-{n}.png" for n in range(count)]
        for n, name in enumerate(names):
            make_image(40 + n, 30, seed=10 * number + n).save(folder / name)
        turns = [
            {"from": "human", "value": "<image>\n" * count + f"question {number}"},
            {"from": "gpt", "value": f"answer {number}"},
        ]
        image = {"image": names} if names else {}
        rows.append({"id": f"r{number}", **image, "conversations": turns, "skill": "any"})
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def shards(files, tmp_path):
    out = tmp_path / "shards"
    assert write_shards(str(files), out, None, per_shard=3) == 7
    assert [path.name for path in sorted(out.iterdir())] == [
        "shard-00000.tar",
        "shard-00001.tar",
        "shard-00002.tar",
    ]
    return out


def same(one, other):
    assert one["id"] == other["id"]
    assert one.get("skill") == other.get("skill")
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(one["labels"], other["labels"])
    assert len(one["pixel_values"]) == len(other["pixel_values"])
    for left, right in zip(one["pixel_values"], other["pixel_values"], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("named", ["folder", "pattern"])
def test_samples_are_those_of_the_files(files, shards, tiny_processor, named):
    path = str(shards) if named == "folder" else f"{shards}/shard-*.tar"
    whole = ConversationDataset(DataSpec(path=str(files)), tiny_processor, 512)
    dataset = ConversationDataset(DataSpec(path=path), tiny_processor, 512)
    assert len(dataset) == 7
    for index in (6, 0, 3, 1, 5, 2, 4):  # in any order
        same(dataset[index], whole[index])
    assert dataset.check_records() in (0, 7)
    assert dataset.lengths().images.tolist() == whole.lengths().images.tolist()
    copy = pickle.loads(pickle.dumps(dataset.records))  # what a loader worker gets
    assert copy[4] == dataset.records[4]


def test_the_deliberate_mistake_of_another_picture_shows(files, shards, tiny_processor, make_image):
    make_image(40, 30, seed=99).save(files.parent / "p3-0.png")
    whole = ConversationDataset(DataSpec(path=str(files)), tiny_processor, 512)
    dataset = ConversationDataset(DataSpec(path=str(shards)), tiny_processor, 512)
    with pytest.raises(AssertionError):
        same(dataset[3], whole[3])


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))


def png(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


TURNS = [{"from": "human", "value": "<image><image>q"}, {"from": "gpt", "value": "a"}]


def test_shards_of_others_pictures_by_name_or_by_number(tmp_path, make_image):
    pictures = {f"{n}.png": png(make_image(seed=n)) for n in (2, 10)}
    by_number = json.dumps({"conversations": TURNS}).encode()
    by_name = json.dumps({"conversations": TURNS, "image": ["10.png", "2.png"]}).encode()
    write_tar(
        tmp_path / "a.tar",
        [
            ("x/b.10.png", pictures["10.png"]),
            ("x/b.json", by_number),
            ("x/b.2.png", pictures["2.png"]),
            ("x/c.json", by_name),
            *((f"x/c.{name}", data) for name, data in pictures.items()),
        ],
    )
    source = RecordSource(tmp_path)
    first, second = source
    assert [picture.name for picture in first.images] == ["2.png", "10.png"]
    assert [picture.name for picture in second.images] == ["10.png", "2.png"]
    assert second.images[0].read() == pictures["10.png"]
    assert "a.tar: record 0" in first.where


def test_a_picture_that_is_not_there_is_named(tmp_path):
    record = {"conversations": TURNS, "image": ["0.png", "1.png"]}
    write_tar(tmp_path / "a.tar", [("k.json", json.dumps(record).encode()), ("k.0.png", b"x")])
    with pytest.raises(ValueError, match=r"a\.tar: record 0 .* no picture '1.png'.*\"0.png\""):
        RecordSource(tmp_path)[0]


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def overwrite(path, at, data):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: cut(path, 1000),
        lambda path: cut(path, 512 * 7 + 100),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("<html>404</html>" * 100),
        lambda path: overwrite(path, 1024, b"\xff" * 64),
        lambda path: overwrite(path, 1024, bytes(512)),
        lambda path: cut(path, path.read_bytes().rstrip(b"\0").__len__()),
    ],
    ids=["cut", "cut later", "empty", "a web page", "header", "early end mark", "no end mark"],
)
def test_a_corrupt_shard_is_one_error_with_its_name_and_remedy(shards, spoil):
    spoil(shards / "shard-00001.tar")
    with pytest.raises(ValueError, match=r"shard-00001\.tar.*opy or download this shard again"):
        RecordSource(shards)


def test_a_shard_that_breaks_after_it_was_indexed_is_named(shards, tiny_processor):
    dataset = ConversationDataset(DataSpec(path=str(shards)), tiny_processor, 512)
    cut(shards / "shard-00001.tar", 600)
    with pytest.raises(ValueError, match=r"shard-00001\.tar: shorter than when it was indexed"):
        dataset[4]


def test_a_broken_picture_in_a_shard_stops_the_run_and_is_named(tmp_path, tiny_processor):
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    record = json.dumps({"id": "z", "conversations": turns}).encode()
    write_tar(tmp_path / "a.tar", [("k.json", record), ("k.jpg", b"\xff\xd8no")])
    dataset = ConversationDataset(DataSpec(path=str(tmp_path)), tiny_processor, 512)
    with pytest.raises(
        ValueError, match=r'a\.tar: record 0 \(id "z"\).*a\.tar/jpg: is not an image'
    ):
        dataset[0]


def test_samples_without_a_record_and_folders_without_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        RecordSource(tmp_path)
    write_tar(tmp_path / "a.tar", [("k.jpg", b"x")])
    with pytest.raises(ValueError, match=r"a\.tar: sample k has jpg, but no k\.json"):
        RecordSource(tmp_path)


def test_parquet_files_become_shards(files, tmp_path, tiny_processor):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = []
    for line in files.read_text().splitlines():
        record = json.loads(line)
        names = record.pop("image", [])
        cells = [{"bytes": (files.parent / name).read_bytes(), "path": name} for name in names]
        rows.append({**record, "images": cells})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    assert main([str(tmp_path / "train-*.parquet"), "--out", str(tmp_path / "out")]) == 0
    whole = ConversationDataset(DataSpec(path=str(files)), tiny_processor, 512)
    dataset = ConversationDataset(DataSpec(path=str(tmp_path / "out")), tiny_processor, 512)
    for index in range(7):
        same(dataset[index], whole[index])


def test_a_corrupt_parquet_file_is_named(tmp_path, capsys):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    assert main([str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]) == 2
    assert "a.parquet: cannot be read" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_left_alone(files, shards):
    with pytest.raises(ValueError, match="not empty"):
        write_shards(str(files), shards, None, 3)
