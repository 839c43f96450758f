"""eval/compare.py: whether two scores differ, why they could, and what cannot be compared."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from eagle_moe.scores.answer import Answer
from eagle_moe.scores.card import CARD, SKILLS, Card, Score
from eval.compare import Field, compare, differing, main
from tests.test_card import make_answers, make_card, make_identity, save

RECIPE = {"stages": [{"name": "align", "lr": 1e-3}, {"name": "sft", "lr": 2e-5}], "seed": 0}


def put(folder: Path, answers: list[Answer], **identity: object) -> Path:
    return save(folder, answers, make_card(answers, identity=make_identity(**identity)))


def asked_of(task: str, data: str = "1") -> dict[str, object]:
    return {"task": make_identity().task.dump() | {"name": task, "data_sha256": data}}


def test_a_clear_difference_is_seen_per_part_and_in_total(tmp_path):
    first = put(tmp_path / "a", make_answers(text=10, chart=5))
    second = put(tmp_path / "b", make_answers(text=0, chart=5), weights_sha256="1")
    (found,) = compare(first, second)
    told = {one.part: (one.first, one.second, one.differ, one.paired) for one in found.differences}
    assert told == {
        "total": (0.75, 0.25, True, True),
        "text": (1.0, 0.0, True, True),
        "chart": (0.5, 0.5, False, True),
    }
    assert found.fields == [Field("weights_sha256", "0", "1")]
    assert (found.n, found.changed) == (20, 10)


def test_pairs_of_items_see_what_two_separate_intervals_do_not(tmp_path):
    """Six of 200 turned wrong, none right: too few for the intervals, not for the pairs."""
    answers = [replace(make_answers(text=1)[0], id=str(index), part="") for index in range(200)]
    wrong = {"prediction": "no", "scores": {"accuracy": 0.0}}
    base = [replace(one, **wrong) if i % 2 else one for i, one in enumerate(answers)]
    worse = [replace(one, **wrong) if i < 12 else one for i, one in enumerate(base)]
    first, second = put(tmp_path / "a", base), put(tmp_path / "b", worse)
    (difference,) = compare(first, second)[0].differences
    one, other = (Card.load(folder).score for folder in (first, second))
    assert other.high > one.low
    assert difference.differ
    assert difference.first - difference.second == pytest.approx(0.03)
    (swapped,) = compare(second, first)[0].differences
    assert swapped.low == pytest.approx(-difference.high, abs=0.006)  # a resample's steps


def test_a_score_beside_itself_differs_in_nothing(tmp_path, capsys):
    folder = put(tmp_path / "a", make_answers(text=4))
    (found,) = compare(folder, folder / CARD)
    assert found.fields == [] and found.changed == 0
    assert not any(one.differ for one in found.differences)
    main([str(folder), str(folder)])
    assert "Nothing differs in how the two scores were made" in capsys.readouterr().out


def test_the_command_tells_why_before_it_tells_what(tmp_path, capsys):
    first = put(tmp_path / "a", make_answers(text=10), recipe=RECIPE, batch_size=8)
    other = RECIPE | {"stages": [RECIPE["stages"][0], {"name": "sft", "lr": 1e-5}]}
    second = put(tmp_path / "b", make_answers(text=0), recipe=other)
    main([str(first), str(second)])
    told = capsys.readouterr().out
    assert told.index("recipe.stages.sft.lr") < told.index("batch_size") < told.index("accuracy")
    assert "2e-05" in told and "1e-05" in told and "differ" in told.split("accuracy")[1]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}, [("a.b.d", 2, 3)]),
        ({"a": None}, {"a": {"b": 1}}, [("a", None, {"b": 1})]),
        ({"a": 1}, {"b": 2}, [("a", 1, None), ("b", None, 2)]),
        ({"a": None}, {}, [("a", None, None)]),
        ({"s": [{"x": 1}, {"x": 2}]}, {"s": [{"x": 1}, {"x": 3}]}, [("s.1.x", 2, 3)]),
        ({"s": [1, 2]}, {"s": [2, 1]}, [("s", [1, 2], [2, 1])]),
        (
            {"s": [{"name": "x"}, {"name": "y"}]},
            {"s": [{"name": "y"}]},
            [("s.x", {"name": "x"}, None)],
        ),
    ],
)
def test_nested_fields_are_named_one_by_one(first, second, expected):
    assert differing(first, second) == [Field(*one) for one in expected]


def test_stages_in_another_order_differ():
    stages, turned = RECIPE["stages"], RECIPE["stages"][::-1]
    assert differing({"stages": stages}, {"stages": turned}) == [Field("stages", stages, turned)]


def points(folder: Path, value: float, low: float | None, high: float | None) -> Path:
    """MME has points of all items at once; only the answers are kept of each."""
    answers = [replace(one, scores={}) for one in make_answers(text=5)]
    score = Score(value=value, low=low, high=high, n=10)
    card = make_card(
        answers,
        metrics={"mme_perception_score": {"total": score}},
        means=[],
        primary="mme_perception_score",
        identity=make_identity(**asked_of("mme")),
    )
    return save(folder, answers, card)


def test_what_is_no_mean_is_compared_by_both_intervals(tmp_path, capsys):
    first = points(tmp_path / "a", 1500, 1460, 1530)
    second = points(tmp_path / "b", 1480, 1450, 1520)
    (one,) = compare(first, second)[0].differences
    assert (one.low, one.high) == pytest.approx((20 - math.hypot(40, 40), 20 + math.hypot(30, 30)))
    assert one.paired is False and one.differ is False
    main([str(first), str(points(tmp_path / "c", 1300, None, None))])
    told = capsys.readouterr().out
    assert "not known" in told and "no mean of items" in told


def test_a_metric_that_one_side_did_not_run_is_told(tmp_path, capsys):
    first = points(tmp_path / "a", 1500, 1460, 1530)
    card = Card.load(first).model_copy(
        update={"metrics": {}, "not_run": {"mme_perception_score": "no key"}}
    )
    second = save(tmp_path / "b", [replace(one, scores={}) for one in make_answers(text=5)], card)
    main([str(first), str(second)])
    assert "mme_perception_score: only one of the two has a number" in capsys.readouterr().out


def test_folders_of_tasks_are_compared_task_by_task(tmp_path, capsys):
    for run, right in (("a", 10), ("b", 0)):
        put(tmp_path / run / SKILLS, make_answers(text=right))
        points(tmp_path / run / "mme", 1500, 1460, 1530)
    put(tmp_path / "a" / "pope", make_answers(text=1), **asked_of("pope"))
    assert [one.task for one in compare(tmp_path / "a", tmp_path / "b")] == [SKILLS, "mme"]
    main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "Only in one of the two: pope" in capsys.readouterr().out


def refused(first: Path, second: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(first), str(second)])
    assert end.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


@pytest.mark.parametrize(
    ("answers", "identity", "message"),
    [
        (make_answers(chart=5), {}, '10 and 10, of which 20 are on one side only, such as "chart'),
        (make_answers(text=5)[:4], {}, "10 and 4, of which 6 are on one side only"),
        (
            [replace(one, target="no", prediction="no") for one in make_answers(text=10)],
            {},
            'have the same id but not the same right answer or part, such as "text-0"',
        ),
        (make_answers(text=5), asked_of(SKILLS, "2"), "ids and answers agree, but task.data_sha2"),
        (make_answers(text=5), asked_of("pope"), "scores of different tasks, eagle_skills and pop"),
    ],
)
def test_scores_over_different_items_are_refused(tmp_path, capsys, answers, identity, message):
    first = put(tmp_path / "a", make_answers(text=5))
    assert message in refused(first, put(tmp_path / "b", answers, **identity), capsys)


def test_what_is_no_score_is_refused(tmp_path, capsys):
    first = put(tmp_path / "a", make_answers(text=5))
    assert f"no {CARD} in it" in refused(first, tmp_path / "nowhere", capsys)
    many = tmp_path / "many"
    for task in ("pope", "mme"):
        put(many / task, make_answers(text=5), **asked_of(task))
    assert "no task in common" in refused(first, many, capsys)
    card = first / CARD
    card.write_text(card.read_text().replace('"value": 0.5', '"value": 0.6'))
    assert "the items beside it give" in refused(first, first, capsys)
