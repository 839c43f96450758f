"""eval/report: every number on the page follows from the answers, and every part is there."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from eagle_moe.scores.answer import Answer, read_answers, write_answers
from eagle_moe.scores.card import ACCURACY, Card, count
from eagle_moe.scores.card import SKILLS as TASK
from eagle_moe.scores.score import is_correct
from eval.items import Item, hash_items, read_items
from eval.page import show_seconds
from eval.report import (
    DemoResults,
    Probe,
    gather,
    print_summary,
    read_curve,
    summarise,
    write_report,
)
from eval.report.figures import COLOURS
from eval.report.page import render_page
from eval.report.results import MODELS
from eval.report.story import headline
from tests.suites import write_suite
from tests.test_card import make_card, make_identity

PER_SKILL = 4
SKILLS = ("text", "chart", "shapes")
PROBE = Probe(columns=["letters", "colour"], rows={"clip": [0.1, 0.9], "sam": [0.6, 0.2]})

# How many of the first questions of each skill a model gets right.
RIGHT = {
    "mixture": {"text": 3, "chart": 4, "shapes": 2},
    "clip_only": {"text": 1, "chart": 3, "shapes": 0},
    "clip_best": {"text": 1, "chart": 4, "shapes": 1},
    "blind": {"text": 0, "chart": 2, "shapes": 0},
}


def write_score(folder: Path, items: list[Item], right: dict[str, int], images: str) -> Path:
    seen = dict.fromkeys(SKILLS, 0)
    answers = []
    for item in items:
        prediction = item.answer if seen[item.skill] < right[item.skill] else "<b>no</b> $x$"
        seen[item.skill] += 1
        answer = Answer(
            id=item.id,
            part=item.skill,
            question=item.question,
            target=item.answer,
            prediction=prediction,
            scores={ACCURACY: float(is_correct(prediction, item.answer))},
            fields={"kind": item.kind},
        )
        answers.append(answer)
    task = make_identity().task.dump() | {"images": images, "data_sha256": hash_items(items)}
    (folder / TASK).mkdir(parents=True)
    write_answers(folder / TASK, answers)
    versions = {"python": "3.11", "torch": "2.15"}
    make_card(answers, identity=make_identity(task=task, versions=versions)).save(folder / TASK)
    return folder


def write_curve(path: Path, end: float) -> Path:
    points = [
        {"step": step, "skill": skill, "exact_match": end * step / 20, "n": 4}
        for step in (0, 10, 20)
        for skill in SKILLS
    ]
    path.write_text("".join(json.dumps(point) + "\n" for point in points))
    return path


@pytest.fixture
def parts(tmp_path) -> dict:
    """What `gather` takes, on disk."""
    data = write_suite(tmp_path / "suite", per_skill=PER_SKILL)
    items = read_items(data)
    return {
        "scores": {
            name: write_score(tmp_path / name, items, right, "drop" if name == "blind" else "keep")
            for name, right in RIGHT.items()
        },
        "data": data,
        "curves": {name: write_curve(tmp_path / f"{name}.jsonl", 0.8) for name in RIGHT},
        "seconds": {"data": 3.0, "experts": 65.2, "evaluation": 0.4},
        "wall_seconds": 60.0,
        "probe": PROBE,
        "ask": "eagle-moe chat --model DIR --image FILE",
        "notes": ["A note of the demo."],
    }


@pytest.fixture
def results(parts) -> DemoResults:
    return gather(**parts)


def test_the_summary_holds_every_number_as_counted_by_hand(results):
    summary = json.loads(json.dumps(summarise(results)))
    for name, right in RIGHT.items():
        for skill in SKILLS:
            assert summary[name][skill]["mean"] == right[skill] / PER_SKILL
            assert summary[name][skill]["n"] == PER_SKILL
        total = summary[name]["total"]
        assert total["mean"] == pytest.approx(sum(right.values()) / 12)
        assert total["low"] <= total["mean"] <= total["high"]
        assert total["n"] == 12
    # training knows 3 words, 2 bars and 3 places, and every test answer is among them
    chance = {"text": 1 / 3, "chart": 1 / 2, "shapes": 1 / 3, "total": (4 + 6 + 4) / 36}
    assert {skill: summary["chance"][skill]["mean"] for skill in chance} == pytest.approx(chance)
    assert summary["seconds"] == {"data": 3.0, "experts": 65.2, "evaluation": 0.4}
    assert summary["wall_seconds"] == 60.0


def test_the_lead_is_the_difference_question_by_question(results):
    lead = results.lead["clip_only"]
    assert lead["total"].mean == pytest.approx((9 - 4) / 12)
    assert lead["chart"].mean == pytest.approx(1 / 4)
    assert lead["total"].low <= lead["total"].mean <= lead["total"].high
    assert set(results.lead) == {"clip_only", "clip_best", "blind"}


def test_samples_show_right_and_wrong_of_every_skill(results):
    shown = {
        skill: [sample.right["mixture"] for sample in samples]
        for skill, samples in results.samples_by_skill.items()
    }
    assert shown == {
        "text": [True, True, False],
        "chart": [
            True,
            True,
            True,
        ],
        "shapes": [True, True, False],
    }


def test_the_three_files_hold_all_parts(results, tmp_path):
    page = write_report(results, tmp_path / "out")
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "report.html",
        "report.png",
        "summary.json",
    ]
    assert json.loads((page.parent / "summary.json").read_text()) == summarise(results)
    text = page.read_text(encoding="utf-8")
    check_page(html.unescape(text), results)
    assert "<b>no</b> $x$" not in text  # what a model says is shown, never run
    with Image.open(page.parent / "report.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.width == 1430
        assert image.height > 2000
    for name in results.models:
        colour = [int(COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == colour).all(axis=1).sum() > 500, name


def check_page(text: str, results: DemoResults) -> None:
    assert headline(results) in text
    for section in ("accuracy", "samples", "curves", "probe", "time", "measured", "ask", "caveats"):
        assert f'<h2 id="{section}">' in text
    for name in results.models:
        for skill in ("total", *SKILLS):
            score = results.accuracy[name][skill]
            numbers = f"{100 * score.mean:.1f} ({100 * score.low:.1f} to {100 * score.high:.1f})"
            assert f"<td>{numbers}</td>" in text
    for sample in results.samples:
        assert base64.b64encode(sample.image.read_bytes()).decode() in text
        assert sample.question in text
    for words in (
        "A guesser that looks up",
        "trained and asked without images",
        "A note of the demo.",
        "eagle-moe chat --model DIR --image FILE",
        "1 min 05 s",
        "1 min 00 s by the clock",
    ):
        assert words in text
    assert text.count("<svg") == 4 + 4 - 1 + 2  # bars (with total), curves, probe, time
    assert not re.search(r"<script|<link|@import|(src|href)=[\"']https?:|url\(http", text)


def test_the_page_does_without_the_optional_parts(parts):
    del parts["scores"]["clip_best"]
    small = gather(parts["scores"], parts["data"], {}, parts["seconds"])
    page = render_page(small)
    for section in ("curves", "probe", "ask"):
        assert f'<h2 id="{section}">' not in page
    assert MODELS["clip_best"] not in page
    assert page == render_page(small)  # the same results give the same page


def test_the_table_in_the_terminal_fits_80_columns(results):
    console = Console(file=StringIO(), width=80)
    print_summary(results, console)
    printed = console.file.getvalue()
    for words in ("total", *SKILLS, "Mixture", "CLIP only", "Blind", "Chance", "75 (", "Lead over"):
        assert words in printed
    assert "…" not in printed


def spoil(parts: dict, name: str, change: Callable[[dict], None]) -> None:
    path = parts["scores"][name] / TASK / "card.json"
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))


def test_scores_that_cannot_be_compared_are_refused(parts, tmp_path):
    spoil(parts, "blind", lambda card: card["identity"]["task"].update(images="keep"))
    with pytest.raises(ValueError, match='blind was evaluated with images="keep"'):
        gather(**parts)
    spoil(parts, "blind", lambda card: card["identity"]["task"].update(images="drop"))
    spoil(parts, "clip_only", lambda card: card["identity"]["task"].update(data_sha256="else"))
    with pytest.raises(ValueError, match="clip_only was not asked the same questions"):
        gather(**parts)
    del parts["scores"]["clip_only"]
    with pytest.raises(ValueError, match="scores: clip_only missing"):
        gather(**parts)
    parts["scores"]["clip_only"] = tmp_path
    with pytest.raises(FileNotFoundError, match=r"card\.json: no such file"):
        gather(**parts)


def test_a_total_that_does_not_follow_is_refused(results):
    fields = dict(results)
    score = fields["accuracy"]["mixture"]["total"]
    wrong = {**fields["accuracy"]["mixture"], "total": score.model_copy(update={"mean": 0.8})}
    fields["accuracy"] = {**fields["accuracy"], "mixture": wrong}
    with pytest.raises(ValueError, match="does not follow from the parts"):
        DemoResults(**fields)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"step": 1, "skill": "a", "exact_match": NaN, "n": 4}', r"c:1: `exact_match` = nan"),
        ('{"step": 1, "skill": "a", "exact_match": 70, "n": 4}', r"`exact_match` = 70"),
        ('{"step": 1, "skill": "a", "n": 4}', r"`exact_match` is required"),
        ("{", r"c:1: not valid JSON"),
    ],
)
def test_bad_curves_are_named(tmp_path, line, complaint):
    (tmp_path / "c").write_text(line + "\n")
    with pytest.raises(ValueError, match=complaint):
        read_curve(tmp_path / "c")


def test_bad_numbers_and_names_are_refused(parts):
    with pytest.raises(ValueError, match=r"`seconds\.data` = nan"):
        gather(**parts | {"seconds": {"data": float("nan")}})
    with pytest.raises(ValueError, match='no model is called "mixtur".*Did you mean "mixture"'):
        gather(**parts | {"curves": {"mixtur": parts["curves"]["mixture"]}})
    with pytest.raises(ValueError, match="row clip has 1 values for 2"):
        Probe(columns=["a", "b"], rows={"clip": [0.1]})


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.42, "0.4 s"),
        (48.3, "48 s"),
        (59.8, "1 min 00 s"),
        (65.2, "1 min 05 s"),
        (600, "10 min 00 s"),
    ],
)
def test_times_are_readable(seconds, shown):
    assert show_seconds(seconds) == shown


def test_the_cards_are_recounted(parts):
    folder = parts["scores"]["mixture"] / TASK
    answers = read_answers(folder)
    assert count(answers, [ACCURACY]) == Card.load(folder).metrics
    write_answers(folder, answers[1:])
    with pytest.raises(ValueError, match="but the items beside it give"):
        gather(**parts)
