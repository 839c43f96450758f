"""Measure: right, found out once, for what was asked; never for another tokenizer or template."""

import json

import numpy as np
import pytest

from train.data import ConversationDataset, DataSpec
from train.data import measure as module
from train.data.measure import UNKNOWN, column
from train.data.source import RecordSource


@pytest.fixture
def path(tmp_path, make_image):
    make_image().save(tmp_path / "x.png")
    rows = []
    for number in range(20):
        image = {"image": "x.png"} if number % 2 else {}
        turns = [
            {"from": "human", "value": ("<image>\n" if image else "") + "q" * number},
            {"from": "gpt", "value": "answer" * (number % 5)},
        ]
        rows.append({"id": f"r{number}", **image, "conversations": turns})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "train.jsonl"


def dataset(path, processor, max_length=64, **fields):
    return ConversationDataset(DataSpec(path=str(path), **fields), processor, max_length)


def encoded(data):
    rows = [data.encode(index) for index in range(len(data))]
    return [(row.length, len(row.input_ids), row.supervised) for row in rows]


def measured(data):
    found = data.lengths()
    columns = (found.length, found.tokens, found.supervised)
    return list(zip(*(values.tolist() for values in columns), strict=True))


@pytest.mark.parametrize("fields", [{}, {"limit": 7}, {"images": "drop"}, {"template": "plain"}])
def test_lengths_are_those_of_the_samples(path, tiny_processor, fields):
    data = dataset(path, tiny_processor, **fields)
    assert measured(data) == encoded(data)
    expected = [len(data.record(index).images) for index in range(len(data))]
    assert data.lengths().images.tolist() == expected


def test_in_parallel_as_in_one_process(path, tiny_processor, monkeypatch):
    monkeypatch.setattr(module, "_MANY", 1)
    monkeypatch.setattr(module, "cpu_count", lambda: 2)
    data = dataset(path, tiny_processor)
    assert measured(data) == encoded(data)


def test_what_is_known_is_not_looked_at_again(path, tiny_processor, monkeypatch):
    seen = []
    source = RecordSource(path)

    def of(index):
        seen.append(index)
        return (index,)

    values, new = column(source, "c", 1, of, np.array([3, 5]), "c")
    assert (values[3, 0], values[5, 0], values[0, 0], new) == (3, 5, UNKNOWN, 2)
    _, new = column(source, "c", 1, of, np.array([3, 4, 5]), "c")
    assert seen == [3, 5, 4]
    assert new == 1
    _, new = column(RecordSource(path), "c", 1, of, np.array([3, 4, 5]), "c")
    assert new == 0


def test_an_interrupted_look_goes_on_where_it_was(path, monkeypatch):
    monkeypatch.setattr(module, "_SAVED", 5)
    source = RecordSource(path)

    def killed(index):
        if index == 12:
            raise KeyboardInterrupt
        return (index,)

    with pytest.raises(KeyboardInterrupt):
        column(source, "c", 1, killed, np.arange(20), "c")
    values, new = column(source, "c", 1, lambda index: (index,), np.arange(20), "c")
    assert new == 10
    assert values[:, 0].tolist() == list(range(20))


def test_other_settings_are_other_lengths(path, tiny_processor, monkeypatch):
    base = dataset(path, tiny_processor)
    base.lengths()
    for other in (
        dataset(path, tiny_processor, 70),
        dataset(path, tiny_processor, template="plain"),
        dataset(path, tiny_processor, images="drop"),
    ):
        assert other.identity != base.identity
        assert measured(other) == encoded(other)
    monkeypatch.setattr(tiny_processor, "image_seq_length", 9)
    other = dataset(path, tiny_processor)
    assert other.identity != base.identity
    assert measured(other) == encoded(other)


def test_changed_data_is_measured_anew(path, tiny_processor):
    before = dataset(path, tiny_processor)
    lengths = measured(before)
    path.write_text(path.read_text().replace("qqq", "qq"))
    after = dataset(path, tiny_processor)
    assert measured(after) == encoded(after) != lengths
    assert after.identity != before.identity


@pytest.mark.parametrize("parallel", [False, True])
def test_the_first_record_that_cannot_be_used_is_named_alone(
    path, tiny_processor, monkeypatch, parallel
):
    if parallel:
        monkeypatch.setattr(module, "_MANY", 1)
        monkeypatch.setattr(module, "cpu_count", lambda: 2)
    lines = path.read_text().splitlines()
    lines[7] = lines[7].replace('"human"', '"humen"')
    lines[11] = lines[11][:-3]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r'record 7 \(id "r7"\).*Did you mean "human"') as error:
        dataset(path, tiny_processor).check_records()
    assert "Traceback" not in str(error.value)
