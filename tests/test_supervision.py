"""Supervision: a run on data that teaches nothing is refused before step 1, with names."""

import json
from dataclasses import replace

import pytest

from train.data import ConversationDataset, DataSpec, build_dataset, check_supervision


@pytest.fixture
def dataset(tmp_path, tiny_processor):
    """Twenty records; numbers 0 and 10 have no answer, number 5 a long one."""
    rows = []
    for number in range(20):
        turns = [{"from": "human", "value": "question"}]
        if number % 10:
            answer = "answer" * (20 if number == 5 else 1)
            turns.append({"from": "gpt", "value": answer})
        rows.append({"id": f"r{number}", "conversations": turns})
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ConversationDataset(DataSpec(path=str(path)), tiny_processor, 64)


def test_whole(dataset):
    report = check_supervision(dataset, limit=0.1, sample=None)
    assert (report.samples, report.checked, report.unsupervised, report.cut) == (20, 20, 2, 1)
    assert report.named == ("r0", "r10")
    assert report.share == 0.1
    encoded = [dataset.encode(n) for n in range(20)]
    assert report.tokens == sum(len(item.input_ids) for item in encoded)
    assert report.supervised_tokens == sum(item.supervised for item in encoded)


def test_above_the_limit_the_run_is_refused(dataset):
    with pytest.raises(ValueError, match=r"2 of 20 samples \(10\.0%\).*limit is 9\.0%.*r0, r10"):
        check_supervision(dataset, limit=0.09, sample=None)


def test_a_part_is_enough_to_notice(dataset):
    report = check_supervision(dataset, limit=1.0, sample=12)
    assert report.checked == 12
    assert report.unsupervised == len(report.named) > 0
    assert dataset.counts()["seen"] == 0  # looked at, not learned from


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"id": "z", "text": "x"}, r"record 20 \(id \"z\"\): give `conversations`"),
        (
            {
                "id": "z",
                "image": ["x.png"] * 5,
                "conversations": [{"from": "human", "value": "<image>" * 5}],
            },
            r"id \"z\"\): 5 images take 80 tokens, but the limit is 64",
        ),
    ],
)
def test_one_impossible_record_is_found_before_step_one(tmp_path, tiny_processor, last, message):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": str(n), "conversations": turns} for n in range(20)]
    path = tmp_path / "late.json"
    path.write_text(json.dumps([*rows, last]))
    dataset = build_dataset([DataSpec(path=str(path))], tiny_processor, 64)
    with pytest.raises(ValueError, match=message):
        check_supervision(dataset, sample=1)


def test_a_limit_that_cuts_every_answer_is_noticed(tmp_path, dataset, tiny_processor):
    short = ConversationDataset(dataset.spec, tiny_processor, 20)
    with pytest.raises(ValueError, match=r"\(100\.0%\) have no token to learn"):
        check_supervision(short)


def test_from_all_lengths_the_same_as_from_all_samples(dataset):
    whole = check_supervision(dataset, limit=0.1, whole=True)
    one_by_one = check_supervision(dataset, limit=0.1, sample=None)
    assert replace(whole, parsed=0) == one_by_one
    with pytest.raises(ValueError, match=r"2 of 20 samples \(10\.0%\).*r0, r10"):
        check_supervision(dataset, limit=0.09, whole=True)


def test_what_was_looked_at_is_told(dataset):
    first = check_supervision(dataset, limit=1.0, sample=12)
    assert (first.parsed, first.checked) == (20, 12)
    assert first.told.startswith("20 samples; 20 records parsed; 12 at random encoded: ")
    again = check_supervision(dataset, limit=1.0, sample=None)
    assert again.told == (
        "20 samples; known to be well-formed; all encoded: 2 teach nothing, 1 are cut"
    )
