"""eval/docs.py: tables of the docs are what the cards beside them give, or are not written."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.docs import BLOCK, DOCS, SCORES, TABLES, main, write_pages

CARD = Path("demo", "mixture", "eagle_skills", "card.json")
SUMMARY = Path("demo", "summary.json")
EXPERTS = Path("experts", "experts.json")


@pytest.fixture
def docs(tmp_path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(DOCS / SCORES, tmp_path / SCORES)
    for page in DOCS.glob("*.md"):
        shutil.copy(page, tmp_path)
    return tmp_path


def write(docs: Path) -> list[str]:
    return [page.name for page in write_pages(sorted(docs.glob("*.md")), docs / SCORES)]


def change(path: Path, how: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    how(data)
    path.write_text(json.dumps(data))


def test_the_pages_say_what_the_cards_give(docs):
    assert write(docs) == []
    shown = [block[2] for page in docs.glob("*.md") for block in BLOCK.finditer(page.read_text())]
    assert sorted(shown) == sorted(TABLES), "every table has a place, and one only"


def test_the_numbers_of_a_page_are_those_of_the_items(docs):
    """By hand, from the items alone."""
    lines = gzip.decompress((docs / SCORES / CARD).with_name("items.jsonl.gz").read_bytes())
    items = [json.loads(line) for line in lines.splitlines()]
    right = [one["prediction"].strip().lower() == one["target"].lower() for one in items]
    share = round(100 * sum(right) / len(right))
    assert f"| total | {share} (" in (docs / "demo.md").read_text()


def test_a_number_changed_by_hand_is_written_anew(docs):
    page = docs / "demo.md"
    text = page.read_text()
    start = text.index("| total | ")
    page.write_text(f"{text[:start]}| total | 99{text[start + 12 :]}")
    assert write(docs) == ["demo.md"]
    assert page.read_text() == text
    assert write(docs) == []


def raised(data: Any) -> None:
    data["metrics"]["accuracy"]["total"]["value"] += 0.001


def raised_skill(data: Any) -> None:
    data["metrics"]["accuracy"]["text"]["value"] += 0.005
    data["metrics"]["accuracy"]["total"]["value"] += 0.001


def raised_chance(data: Any) -> None:
    data["chance"]["total"]["mean"] += 0.001


def fewer(data: Any) -> None:
    for part in data["chance"].values():
        part["n"] //= 2


def other_questions(data: Any) -> None:
    data["identity"]["task"]["data_sha256"] = "0" * 64


def raised_loss(data: Any) -> None:
    data["leave_one_out"]["log_prob"]["clip"]["total"]["value"] += 0.001


def raised_run(data: Any) -> None:
    next(iter(data["retrained"].values()))["runs"][0]["lost"]["accuracy"]["total"] += 0.001


@pytest.mark.parametrize(
    ("path", "how", "message"),
    [
        (CARD, raised, "does not follow from the parts"),
        (CARD, raised_skill, "the items beside it give"),
        (CARD, other_questions, "was not asked the same questions as the mixture"),
        (SUMMARY, raised_chance, "chance: the total .* does not follow from the parts"),
        (SUMMARY, fewer, "its chance is of other questions"),
        (EXPERTS, raised_loss, "does not follow from the parts"),
        (EXPERTS, raised_run, "lost.accuracy.total is .* but its runs give"),
        (EXPERTS, lambda data: data.pop("experts"), "experts.json: `experts` is required"),
    ],
)
def test_nothing_is_written_when_a_number_does_not_follow(docs, path, how, message, capsys):
    change(docs / SCORES / path, how)
    (docs / "demo.md").write_text(
        "<!-- table: demo (python -m eval.docs) -->\n<!-- end of table -->"
    )
    before = {page: page.read_text() for page in docs.glob("*.md")}
    with pytest.raises(ValueError, match=message):
        write(docs)
    with pytest.raises(SystemExit) as stopped:
        main(["--docs", str(docs)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert {page: page.read_text() for page in docs.glob("*.md")} == before


def test_a_table_that_there_is_not_is_refused_with_the_nearest_name(docs):
    (docs / "mine.md").write_text(
        "<!-- table: dmo (python -m eval.docs) -->\n<!-- end of table -->"
    )
    with pytest.raises(ValueError, match='mine.md: no table is called "dmo". Did you mean "demo"'):
        write(docs)


def test_the_scores_of_a_run_are_taken(docs, tmp_path, capsys):
    run = tmp_path / "run"
    for name in ("mixture", "clip_only", "blind"):
        shutil.copytree(docs / SCORES / "demo" / name, run / "scores" / name)
    shutil.copytree(docs / SCORES / "experts", run / "experts")
    shutil.rmtree(docs / SCORES)
    told = ["--docs", str(docs), "--demo", str(run), "--experts", str(run / "experts")]
    with pytest.raises(SystemExit) as stopped:
        main(told)
    assert stopped.value.code == 2
    assert "summary.json: no such file. Is the run finished?" in capsys.readouterr().err
    shutil.copy(DOCS / SCORES / SUMMARY, run)
    main(told)
    assert "written: demo.md" in capsys.readouterr().out
    assert "CLIP only, own recipe |" not in (docs / "demo.md").read_text()
    main(["--docs", str(docs)])
    assert "nothing had changed" in capsys.readouterr().out
