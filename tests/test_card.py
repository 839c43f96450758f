"""eval/card.py: a card says what its answers say, or is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from eval.answer import Answer
from eval.card import ANSWERS, CARD, Card, count, write_json
from eval.identity import Identity
from eval.score import Estimate


def make_answers(**right_of_ten: int) -> list[Answer]:
    return [
        Answer(f"{skill}-{i}", skill, "k", "q", "yes", "yes" if i < right else "no", i < right)
        for skill, right in right_of_ten.items()
        for i in range(10)
    ]


def make_identity(**changes) -> Identity:
    fields = {
        "weights_sha256": "0",
        "model_type": "eagle_moe",
        "recipe": None,
        "task": {
            "name": "skills",
            "version": 1,
            "seed": 0,
            "split": "test",
            "data_sha256": "1",
            "images": "keep",
        },
        "template_sha256": "2",
        "prompt": "q",
        "decoding": {},
        "batch_size": 1,
        "dtype": "float32",
        "device": "cpu",
        "versions": {},
    }
    return Identity.parse(fields | changes, "test")


def make_card(answers: list[Answer], **changes) -> Card:
    fields = {
        "model": "runs/x",
        "accuracy": count(answers),
        "identity": make_identity(),
        "seconds": 2.0,
        "questions_per_second": 10.0,
    }
    return Card(**(fields | changes))


def save(folder: Path, answers: list[Answer], card: Card) -> Path:
    (folder / ANSWERS).write_text("".join(json.dumps(asdict(a)) + "\n" for a in answers))
    card.save(folder)
    return folder


def edit(folder: Path, *keys: str, value: object) -> None:
    data = json.loads((folder / CARD).read_text())
    node = data
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    (folder / CARD).write_text(json.dumps(data))


def test_what_is_saved_is_loaded_and_follows_from_the_answers(tmp_path):
    answers = make_answers(text=3, chart=8)
    card = make_card(answers)
    assert Card.load(save(tmp_path, answers, card)) == card
    lines = [json.loads(line) for line in (tmp_path / ANSWERS).read_text().splitlines()]
    recount = sum(line["prediction"] == line["answer"] for line in lines) / len(lines)
    assert card.accuracy["total"].mean == recount == 0.55


@pytest.mark.parametrize(
    ("keys", "value", "complaint"),
    [
        (("accuracy", "total", "mean"), 0.6, "does not follow from the skills"),
        (("accuracy", "total", "n"), 30, "does not follow from the skills"),
        (("accuracy", "total", "high"), 0.5, "low <= mean <= high"),
        (("accuracy", "text", "mean"), float("nan"), "low <= mean <= high"),
        (("seconds",), float("nan"), "finite number"),
        (("accurracy",), {}, 'Did you mean "accuracy"'),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(tmp_path, keys, value, complaint):
    answers = make_answers(text=3, chart=8)
    edit(save(tmp_path, answers, make_card(answers)), *keys, value=value)
    with pytest.raises(ValueError, match=complaint):
        Card.load(tmp_path)


def test_a_card_that_its_answers_contradict_is_refused(tmp_path):
    answers = make_answers(text=3, chart=8)
    card = make_card(answers)
    save(tmp_path, make_answers(text=3, chart=7), card)
    with pytest.raises(ValueError, match="`chart` is .* but the answers beside it give"):
        Card.load(tmp_path)
    save(tmp_path, make_answers(text=3, chart=8, form=1), card)
    with pytest.raises(ValueError, match="`form` is None, but the answers"):
        Card.load(tmp_path)


def test_an_answer_that_is_not_what_it_says_is_refused():
    answer = Answer("a", "text", "k", "q", "yes", "no", True)
    with pytest.raises(ValueError, match='"a": `correct` is True, but the prediction is "no"'):
        count([answer])


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"card\.json: no such file.*eval\.run"):
        Card.load(tmp_path)
    answers = make_answers(text=3)
    save(tmp_path, answers, make_card(answers))
    (tmp_path / CARD).write_text("{")
    with pytest.raises(ValueError, match=r"card\.json: not valid JSON"):
        Card.load(tmp_path)
    (tmp_path / ANSWERS).unlink()
    with pytest.raises(FileNotFoundError, match=r"answers\.jsonl: no such file"):
        Card.load(tmp_path)


def test_a_card_needs_skills():
    total = Estimate(mean=0.5, low=0.4, high=0.6, n=10)
    with pytest.raises(ValueError, match="at least one skill"):
        make_card(make_answers(text=5), accuracy={"total": total})


def test_a_number_that_is_none_is_never_written(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
