"""train/search/report, written again: from its own files, or of an equal search."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.mini_search import mini_choice, mini_facts
from train.search.report import Clock, SearchFacts, write_report
from train.search.report.__main__ import main
from train.search.report.content import build_document
from train.search.report.markdown import to_markdown
from train.search.report.summary import read_summary
from train.search.rounds import Candidate, Choice


@pytest.fixture(scope="module")
def choice() -> Choice:
    return mini_choice()


@pytest.fixture(scope="module")
def facts() -> SearchFacts:
    return mini_facts()


@pytest.fixture(scope="module")
def out(choice: Choice, facts: SearchFacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the mini search, which tests read and leave as it is."""
    folder = tmp_path_factory.mktemp("report")
    paths = write_report(choice, facts, folder)
    assert sorted(folder.iterdir()) == sorted(paths)
    return folder


def test_equal_searches_differ_by_the_clock_alone(
    choice: Choice, facts: SearchFacts, out: Path, tmp_path: Path
) -> None:
    rows = tuple(dict(row) | {"seconds": 1.0} for row in reversed(facts.ledger[1:]))
    clock, notes = Clock(9.0, 8.0, 7.0, "x", "y"), ("It took 3 s.",)
    slow = replace(facts, ledger=rows, clock=clock, notes=notes)
    write_report(slower(choice), slow, tmp_path)
    for name in ("rounds.png", "parameters.png", "flops.png"):
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes(), name
    ours, theirs = [
        (each / "report.md").read_text().split("## By the clock") for each in (out, tmp_path)
    ]
    assert ours[0] == theirs[0]
    assert ours[1] != theirs[1]
    kept, other = [json.loads((each / "summary.json").read_text()) for each in (out, tmp_path)]
    assert kept.pop("clock") != other.pop("clock")
    assert kept == other
    more = {"key": "d" * 64, "members": ["clip"], "status": "done", "score": 0.2, "seed": 5}
    another = replace(slow, ledger=(*rows, more))  # another trial tells
    wrong = to_markdown(build_document(choice, another))
    assert wrong.split("## By the clock")[0] != ours[0]


def slower(choice: Choice) -> Choice:
    """The same decisions on another machine."""

    def on_it(each: Candidate) -> Candidate:
        return replace(each, cost=replace(each.cost, images_per_second=1.5))

    rounds = []
    for each in choice.rounds:
        assert each.incumbent is not None
        changed = replace(each, incumbent=on_it(each.incumbent))
        rounds.append(replace(changed, candidates=tuple(map(on_it, each.candidates))))
    return replace(choice, rounds=tuple(rounds))


def test_a_report_is_written_again_from_its_files(
    choice: Choice,
    facts: SearchFacts,
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(out / "summary.json", tmp_path)
    lines = [json.dumps(row) for row in facts.ledger]
    (tmp_path / "ledger.jsonl").write_text("\n".join(lines) + '\n{"key": "torn')
    assert read_summary(tmp_path) == (choice, facts)
    assert main([str(tmp_path)]) == 0
    for path in out.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda text: text[:-40], "not what a search writes"),
        (lambda text: text.replace('"rounds"', '"runds"'), r"KeyError\('rounds'\)"),
        (lambda text: text.replace('"mean": 0.31,', '"mean": "high",'), "mean"),
    ],
)
def test_a_damaged_summary_is_named(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, complaint: str
) -> None:
    path = tmp_path / "summary.json"
    path.write_text(spoil((out / "summary.json").read_text()))
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert str(path) in said and re.search(complaint, said)


def test_no_summary_is_an_error_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no such file. Give the folder that a search wrote into" in capsys.readouterr().err
