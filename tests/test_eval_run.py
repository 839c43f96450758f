"""eval/run.py: a checkpoint folder and a suite in, answers and a card out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from eval.answer import ITEMS, CheckpointAnswerer, read_answers
from eval.card import CARD, SKILLS, Card
from eval.run import evaluate, main
from tests.suites import write_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"), per_skill=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder, suite) -> Path:
    out = tmp_path_factory.mktemp("out")
    evaluate(tiny_folder, suite, out, batch_size=4, device="cpu")
    return out / SKILLS


def test_the_card_is_what_an_independent_recount_gives(finished, suite):
    card = json.loads((finished / CARD).read_text())
    lines = [
        json.loads(line) for line in gzip.decompress((finished / ITEMS).read_bytes()).splitlines()
    ]
    truth = [json.loads(line) for line in (suite / "test.jsonl").read_text().splitlines()]
    right = {line["id"]: line["prediction"] for line in lines}
    for skill in ("text", "chart", "shapes", "total"):
        asked = [row for row in truth if skill in (row["skill"], "total")]
        hits = [right[row["id"]].strip().lower() == row["answer"] for row in asked]
        assert card["metrics"]["accuracy"][skill]["value"] == sum(hits) / len(hits)
        assert card["metrics"]["accuracy"][skill]["n"] == len(asked)
    assert sorted(right) == sorted(row["id"] for row in truth)
    assert card["seconds"] > 0
    assert card["questions_per_second"] > 0
    assert sorted(path.name for path in finished.iterdir()) == [CARD, ITEMS]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_answers_do_not_depend_on_the_batch_size(
    finished, tiny_folder, suite, tmp_path, batch_size
):
    evaluate(tiny_folder, suite, tmp_path, batch_size=batch_size, device="cpu")
    assert read_answers(tmp_path / SKILLS) == read_answers(finished)


def test_what_is_finished_is_read_back_unless_anything_changed(
    finished, tiny_folder, suite, monkeypatch
):
    asked: list[int] = []
    ask = CheckpointAnswerer.__call__

    def counting(self, items):
        asked.append(len(items))
        return ask(self, items)

    monkeypatch.setattr(CheckpointAnswerer, "__call__", counting)
    card = evaluate(tiny_folder, suite, finished.parent, batch_size=4, device="cpu")
    assert asked == []
    assert Card.load(finished).dump() == card
    blind = evaluate(tiny_folder, suite, finished.parent, batch_size=4, device="cpu", images="drop")
    assert sum(asked) == 9
    assert blind["identity"]["task"]["images"] == "drop"
    assert Card.load(finished).dump() == blind
    evaluate(tiny_folder, suite, finished.parent, batch_size=4, device="cpu")


def test_an_interrupted_evaluation_continues(finished, tiny_folder, suite, tmp_path):
    def stop(done: int, total: int, note: str) -> None:
        assert total == 9
        assert note.endswith("% right")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_folder, suite, tmp_path, batch_size=4, device="cpu", progress=stop)
    assert not (tmp_path / SKILLS / CARD).exists()
    (part,) = (tmp_path / SKILLS).glob("answers.*.part.jsonl")
    assert len(part.read_text().splitlines()) == 4
    seen: list[int] = []
    card = evaluate(
        tiny_folder,
        suite,
        tmp_path,
        batch_size=4,
        device="cpu",
        progress=lambda *a: seen.append(a[0]),
    )
    assert seen == [8, 9]
    assert card["metrics"] == json.loads((finished / CARD).read_text())["metrics"]
    assert sorted(path.name for path in (tmp_path / SKILLS).iterdir()) == [CARD, ITEMS]


def test_a_part_of_other_settings_is_not_continued(tiny_folder, suite, tmp_path):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_folder, suite, tmp_path, batch_size=4, device="cpu", progress=stop)
    card = evaluate(tiny_folder, suite, tmp_path, batch_size=4, device="cpu", max_new_tokens=9)
    assert card["identity"]["decoding"]["max_new_tokens"] == 9
    assert sorted(path.name for path in (tmp_path / SKILLS).iterdir()) == [CARD, ITEMS]


def test_the_command_prints_a_table(finished, tiny_folder, suite, capsys):
    where = f"--model {tiny_folder} --data {suite} --out {finished.parent}"
    main(f"{where} --batch-size 4 --device cpu".split())
    printed = capsys.readouterr().out
    for word in ("total", "text", "chart", "shapes", "95 % interval", "images: keep"):
        assert word in printed


def test_the_command_names_what_is_wrong(tiny_folder, suite, tmp_path, capsys):
    cases = [
        (tmp_path, suite, "not a checkpoint folder"),
        (tiny_folder, tmp_path, "test.jsonl: no such file"),
    ]
    for model, data, complaint in cases:
        with pytest.raises(SystemExit) as stopped:
            main(["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")])
        assert stopped.value.code == 2
        assert complaint in capsys.readouterr().err


def test_zero_questions_are_refused(tiny_folder, suite, tmp_path):
    with pytest.raises(ValueError, match="limit = 0"):
        evaluate(tiny_folder, suite, tmp_path, limit=0)


def test_a_limit_asks_that_many(tiny_folder, suite, tmp_path):
    card = evaluate(tiny_folder, suite, tmp_path, limit=3, device="cpu")
    assert {skill: score["n"] for skill, score in card["metrics"]["accuracy"].items()} == {
        "total": 3,
        "text": 1,
        "chart": 1,
        "shapes": 1,
    }
    assert Card.load(tmp_path / SKILLS).dump() == card
