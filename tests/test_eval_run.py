"""eval/run.py: a checkpoint folder and a suite in, cards out; the work in processes of its own."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

import eval.run
from eagle_moe.answer import Answerer
from eagle_moe.scores.answer import ITEMS, read_answers
from eagle_moe.scores.card import CARD, SKILLS, Card, Score
from eval.child import follow
from eval.harness import MARK, RunFailed, Settings
from eval.items import read_items
from eval.run import evaluate, main, print_card, run
from tests.suites import write_suite
from tests.test_card import make_answers, make_card

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="needs the extra `eval`"
)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"), per_skill=3)


@pytest.fixture(scope="module")
def alone(tiny_folder, suite) -> dict[str, str]:
    """What the model says to every question, asked by itself and without lmms-eval."""
    answerer = Answerer.load(tiny_folder, max_new_tokens=16, device="cpu")
    said = {}
    for item in read_items(suite):
        image = {"type": "image", "image": str(item.image)}
        content = [image, {"type": "text", "text": item.question}]
        (said[item.id],) = answerer([[{"role": "user", "content": content}]])
    return {name: text.strip() for name, text in said.items()}


@needs_lmms_eval
def test_a_run_leaves_a_card_with_items_and_nothing_else(tiny_folder, suite, alone, tmp_path):
    seen: list[tuple[int, int, str]] = []
    card = evaluate(
        tiny_folder, suite, tmp_path, batch_size=4, device="cpu", progress=lambda *a: seen.append(a)
    )
    assert [told[:2] for told in seen] == [(4, 9), (8, 9), (9, 9)]
    assert all(told[2].startswith("eagle_skills: ") for told in seen)
    assert Card.load(tmp_path / SKILLS).dump() == card
    assert {answer.id: answer.prediction for answer in read_answers(tmp_path / SKILLS)} == alone
    assert sorted(path.name for path in (tmp_path / SKILLS).iterdir()) == [CARD, ITEMS]


@needs_lmms_eval
def test_two_processes_give_the_same_as_one(tiny_folder, suite, alone, tmp_path):
    settings = Settings(
        model=str(tiny_folder), tasks=[SKILLS], data=str(suite), out=str(tmp_path), batch_size=4
    )
    (card,) = run(settings, processes=2).values()
    answers = read_answers(tmp_path / SKILLS)
    assert [answer.id for answer in answers] == [item.id for item in read_items(suite)]
    assert {answer.id: answer.prediction for answer in answers} == alone
    assert card.identity.processes == 2
    assert (card.images_seen, card.score.n) == (9, 9)
    assert sorted(path.name for path in (tmp_path / SKILLS).iterdir()) == [CARD, ITEMS]


def told(kind: str, **content: object) -> str:
    return f"print({MARK + json.dumps({'kind': kind} | content)!r}, flush=True)"


@needs_lmms_eval
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("FileNotFoundError", FileNotFoundError),
        ("ValueError", ValueError),
        ("RunFailed", RunFailed),
    ],
)
def test_what_the_harness_complains_of_is_raised_here(
    tiny_folder, suite, tmp_path, monkeypatch, kind, error
):
    script = told("error", type=kind, message="no such thing") + "; import sys; sys.exit(2)"
    fake = [sys.executable, "-c", script]
    monkeypatch.setattr(eval.run, "follow", lambda _, *rest: follow(fake, *rest))
    with pytest.raises(error, match="no such thing"):
        evaluate(tiny_folder, suite, tmp_path)


@needs_lmms_eval
def test_a_harness_that_dies_is_an_error_with_the_end_of_its_log(
    tiny_folder, suite, tmp_path, monkeypatch, capsys
):
    script = "import sys; print('noise'); sys.stderr.write('out of memory'); sys.exit(1)"
    fake = [sys.executable, "-c", script]
    monkeypatch.setattr(eval.run, "follow", lambda _, *rest: follow(fake, *rest))
    with pytest.raises(RuntimeError, match=r"(?s)harness ended with 1;.*out of memory"):
        evaluate(tiny_folder, suite, tmp_path)
    assert "noise" in (tmp_path / "harness.log").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tiny_folder), "--data", str(suite), "--out", str(tmp_path)])
    assert stopped.value.code == 1
    assert "out of memory" in capsys.readouterr().err


@needs_lmms_eval
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"--model": "{empty}"}, "not a checkpoint folder"),
        ({"--data": "{empty}"}, "test.jsonl: no such file"),
        ({"--limit": "0"}, "limit = 0"),
        ({"--batch-size": "0"}, "batch_size = 0"),
        ({"--tasks": "skils"}, 'no "skils". Did you mean "skills"'),
        ({"--tasks": "docvqa_vall"}, 'no "docvqa_vall". Did you mean "docvqa_val"'),
        ({"--tasks": "pope", "--data": "{empty}/nowhere"}, "no such folder"),
    ],
)
def test_the_command_names_what_is_wrong_before_it_starts_anything(
    tiny_folder, suite, tmp_path, capsys, changes, complaint
):
    options = {"--model": str(tiny_folder), "--data": str(suite), "--out": str(tmp_path / "out")}
    options |= {name: value.format(empty=tmp_path) for name, value in changes.items()}
    with pytest.raises(SystemExit) as stopped:
        main([word for pair in options.items() for word in pair])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_extra_it_is_named(tiny_folder, suite, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.tasks.catalogue.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"lmms_eval is not installed.*\[eval\]"):
        evaluate(tiny_folder, suite, tmp_path)


def test_a_card_is_shown_with_what_a_reader_must_know():
    card = make_card(make_answers(text=3, chart=8))
    metrics = card.metrics | {"points": {"total": Score(value=1528, low=1490, high=1571, n=60)}}
    changes = {"metrics": metrics, "not_run": {"judged": "no key"}, "notes": ["a note"]}
    out = Console(file=io.StringIO(), width=120)
    print_card(card.model_copy(update=changes), out)
    printed = out.file.getvalue()
    for text in ("accuracy, chart", "80.0%", "1490.0 to 1571.0", "not run", "no key", "a note"):
        assert text in printed
    assert "images: keep" in printed
