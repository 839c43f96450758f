"""eagle_moe/scores/card.py: a card says what its answers say, or is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from eagle_moe.scores.answer import ITEMS, Answer, read_answers, write_answers
from eagle_moe.scores.card import ACCURACY, CARD, SKILLS, Card, Score, count, find_cards, write_json
from eagle_moe.scores.identity import Identity


def make_answers(**right_of_ten: int) -> list[Answer]:
    return [
        Answer(
            id=f"{skill}-{i}",
            part=skill,
            question="q",
            target="yes",
            prediction="yes" if i < right else "no",
            scores={ACCURACY: float(i < right)},
            fields={"kind": "k"},
        )
        for skill, right in right_of_ten.items()
        for i in range(10)
    ]


def make_identity(**changes) -> Identity:
    fields = {
        "weights_sha256": "0",
        "model_type": "eagle_moe",
        "recipe": None,
        "task": {
            "name": SKILLS,
            "version": "1",
            "config_sha256": "3",
            "dataset": None,
            "split": "test",
            "seed": 0,
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
        "primary": ACCURACY,
        "metrics": changes.get("metrics") or count(answers, [ACCURACY]),
        "means": [ACCURACY],
        "identity": make_identity(),
        "seconds": 2.0,
        "questions_per_second": 10.0,
    }
    return Card(**(fields | changes))


def save(folder: Path, answers: list[Answer], card: Card) -> Path:
    write_answers(folder, answers)
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
    lines = [
        json.loads(line) for line in gzip.decompress((tmp_path / ITEMS).read_bytes()).splitlines()
    ]
    recount = sum(line["prediction"] == line["target"] for line in lines) / len(lines)
    assert card.score.value == card.accuracy["total"].mean == recount == 0.55
    assert read_answers(tmp_path) == answers


@pytest.mark.parametrize(
    ("keys", "value", "complaint"),
    [
        (("metrics", ACCURACY, "total", "value"), 0.6, "does not follow from the parts"),
        (("metrics", ACCURACY, "total", "n"), 30, "does not follow from the parts"),
        (("metrics", ACCURACY, "total", "high"), 0.5, "low <= value <= high"),
        (("metrics", ACCURACY, "text", "value"), float("nan"), "finite number"),
        (("metrics", ACCURACY, "text", "low"), None, "both ends of the interval"),
        (("metrics", "f1"), {"text": {"value": 1.0, "n": 2}}, "metric f1 has no `total`"),
        (("primary",), "f1", '"f1" is not among its metrics'),
        (("seconds",), float("nan"), "finite number"),
        (("metricks",), {}, 'Did you mean "metrics"'),
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
    with pytest.raises(ValueError, match="`chart` is .* but the items beside it give"):
        Card.load(tmp_path)
    save(tmp_path, make_answers(text=3, chart=8, form=1), card)
    with pytest.raises(ValueError, match="`form` is None, but the items"):
        Card.load(tmp_path)


def test_an_item_that_is_not_as_right_as_it_says_is_refused(tmp_path):
    answers = make_answers(text=3)
    card = make_card(answers)
    answers[0] = dataclasses.replace(answers[0], prediction="no")
    with pytest.raises(ValueError, match=r'"text-0": its scores are .*1.0.* prediction is "no"'):
        Card.load(save(tmp_path, answers, card))


def test_only_means_are_recounted_and_a_metric_may_miss_on_some_items(tmp_path):
    """F1 and the like follow from no mean; ChartQA scores an item in one of its two halves."""
    identity = make_identity(task=make_identity().task.dump() | {"name": "chartqa"})
    scores = [{"all": 1.0, "human": 1.0}, {"all": 0.0, "machine": 0.0}, {"all": 1.0, "human": 0.5}]
    answers = [
        Answer(str(i), "", "q", ["a", "b"], "x", score, {}) for i, score in enumerate(scores)
    ]
    metrics = count(answers, ["all", "human", "machine"])
    assert {name: (parts["total"].value, parts["total"].n) for name, parts in metrics.items()} == {
        "all": (pytest.approx(2 / 3), 3),
        "human": (0.75, 2),
        "machine": (0.0, 1),
    }
    metrics["f1"] = {"total": Score(value=0.9, n=3)}
    means = ["all", "human", "machine"]
    card = make_card(answers, identity=identity, metrics=metrics, primary="f1", means=means)
    out = tmp_path / "chartqa"
    out.mkdir()
    save(out, answers, card)
    assert find_cards(tmp_path) == {"chartqa": card}
    assert card.score.value == 0.9
    edit(out, "metrics", "human", "total", "value", value=0.8)
    with pytest.raises(ValueError, match="human, `total` is .* but the items beside it give"):
        Card.load(out)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"card\.json: no such file.*eval\.run"):
        Card.load(tmp_path)
    answers = make_answers(text=3)
    save(tmp_path, answers, make_card(answers))
    (tmp_path / CARD).write_text("{")
    with pytest.raises(ValueError, match=r"card\.json: not valid JSON"):
        Card.load(tmp_path)
    save(tmp_path, answers, make_card(answers))
    (tmp_path / ITEMS).write_bytes((tmp_path / ITEMS).read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"items\.jsonl\.gz: not a complete file"):
        Card.load(tmp_path)
    (tmp_path / ITEMS).write_bytes(gzip.compress(b'{"id": 1}\n'))
    with pytest.raises(ValueError, match=r"items\.jsonl\.gz:1: not an answer"):
        Card.load(tmp_path)
    (tmp_path / ITEMS).unlink()
    with pytest.raises(FileNotFoundError, match=r"items\.jsonl\.gz: no such file"):
        Card.load(tmp_path)


def test_what_was_not_run_has_no_number():
    card = make_card(make_answers(text=5), metrics={}, means=[], not_run={ACCURACY: "no judge"})
    assert card.score is None


def test_a_number_that_is_none_is_never_written(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
