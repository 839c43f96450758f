"""train/search/report: all that was decided is on the page, and nothing that was not."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.paper_search import BASE, FIG_4, POOL, paper_choice
from train.search.report import Clock, Reuse, SearchFacts, write_report
from train.search.report.__main__ import main
from train.search.report.content import build_document
from train.search.report.figures import PATH
from train.search.report.markdown import to_markdown
from train.search.report.mixtures import Scale, pareto_front, scored_mixtures, short_title
from train.search.report.page import to_html
from train.search.report.summary import read_summary
from train.search.rounds import Candidate, Choice, Interval, Proxy, Round
from train.search.trial import Cost

EXPERTS = ("clip", "convnext", "sam", "eva02", "pix2struct")
TASKS = ("text", "chart", "shapes", "handwriting")
SCALE = {"clip": 1.0, "convnext": 1.2, "sam": 0.8, "eva02": 0.9, "pix2struct": 1.1}


def candidate(names: str, added: str | None, mean: float, gain: float | None, **more: Any) -> Any:
    """A mixture of the mini search: gains are known to two points, scores to four."""
    members = tuple(names.split())
    size = sum(SCALE[name] for name in members)
    fields: dict[str, Any] = {
        "score": Interval(mean, mean - 0.04, mean + 0.04),
        "gain": None if gain is None else Interval(gain, gain - 0.02, gain + 0.02),
        "verdict": None,
        "seeds": (0, 1),
        "tasks": {task: round(mean + (i - 1.5) / 10, 4) for i, task in enumerate(TASKS)},
        "cost": Cost(1e5 + 3.5e5 * size, 5e7 * size, 120 / size),
    }
    if gain is not None:
        fields["verdict"] = (
            "better" if gain > 0.02 else "worse" if gain < -0.02 else ("not distinguishable")
        )
    return Candidate(members, added, **fields | more)


def broken(names: str, added: str, verdict: Any, **more: Any) -> Candidate:
    return Candidate(tuple(names.split()), added, None, None, verdict, **more)


@pytest.fixture(scope="module")
def choice() -> Choice:
    start = candidate("clip", None, 0.24, None)
    winner = candidate("clip convnext", "convnext", 0.31, 0.07)
    first = Round(
        1,
        start,
        (
            winner,
            candidate("clip sam", "sam", 0.25, 0.01),
            candidate("clip eva02", "eva02", 0.20, -0.04),
            broken("clip pix2struct", "pix2struct", "dropped", proxy=0.11),
        ),
        winner.members,
        'noise-aware: +convnext is better by 7.0 <points> than "clip".',
        hinges_on=("text",),
        proxies=(Proxy(0.25, 4, 3, 0.67),),
    )
    error = "ValueError: expert `sam`: <script>alert(1)</script>\nlog: stages/9f/log.txt"
    second = Round(
        2,
        replace(winner, gain=None, verdict=None),
        (
            broken("clip convnext sam", "sam", "failed", error=error),
            candidate("clip convnext eva02", "eva02", 0.315, 0.005, seeds=(0, 1, 2)),
            candidate("clip convnext pix2struct", "pix2struct", 0.30, -0.01),
        ),
        None,
        "noise-aware: nothing is better than what there is.",
    )
    return Choice(winner.members, (first, second), "greedy", "noise_aware")


@pytest.fixture(scope="module")
def facts() -> SearchFacts:
    rows = [
        {"key": "b" * 64, "members": ["clip", "sam"], "status": "failed", "score": None, "seed": 1},
        {"key": "a" * 64, "members": ["clip"], "status": "done", "score": 0.24, "seed": 0},
        {"key": "b" * 64, "members": ["clip", "sam"], "status": "done", "score": 0.25, "seed": 1},
        {
            "key": "c" * 64,
            "members": ["clip", "eva02"],
            "status": "failed",
            "score": None,
            "seed": 0,
            "error": "killed | by *hand*",
            "log": "OUT/log.txt",
        },
    ]
    return SearchFacts(
        "Search on the built-in suite",
        EXPERTS,
        ("clip",),
        ledger=tuple({"steps": 200, "budget": 1.0, "seconds": 9.5} | row for row in rows),
        reuse=Reuse(2_400, 6_000, 5, 17, stages=18, stages_without_reuse=22),
        clock=Clock(1_830.0, 3_000.0, 7_500.0, "2026-11-21 09:00", "2026-11-21 09:31"),
        settings={"recipe": "configs/recipes/mini.yaml", "rule": {"name": "noise_aware"}},
        fingerprints={"recipe": "sha256:12", "data": "sha256:34", "code": "0.1.0+abc"},
        versions={"python": "3.11", "torch": "2.15"},
        machine="Some CPU, 2 cores",
        notes=("align: feature cache refused, as it does not pay.",),
    )


@pytest.fixture(scope="module")
def out(choice: Choice, facts: SearchFacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the mini search, which tests read and leave as it is."""
    folder = tmp_path_factory.mktemp("report")
    paths = write_report(choice, facts, folder)
    assert sorted(folder.iterdir()) == sorted(paths)
    return folder


def markdown_of(choice: Choice, facts: SearchFacts) -> str:
    return to_markdown(build_document(choice, facts))


def text_of(page: Path) -> str:
    """What a person reads of a page."""
    raw = re.sub(r"<style>.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", raw)).replace("\N{ZERO WIDTH SPACE}", "")


def test_the_papers_search_is_told_as_the_paper_tells_it(tmp_path: Path) -> None:
    choice = paper_choice()
    assert choice.chosen == ("clip", "convnext", "sam", "pix2struct", "eva02")
    write_report(choice, SearchFacts("Fig. 4", POOL, BASE), tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    for number, score in enumerate((690.7, 694.6, 697.1), start=1):
        section = markdown.split(f"### Round {number} ")[1].split("###")[0]
        assert f"**{score}**" in section
    assert "### Round 4 stops the search" in markdown
    page = text_of(tmp_path / "report.html")
    for score, _, _, speed in FIG_4.values():
        assert f" {score} " in page and f" {speed:g} " in page
    assert "95 %" not in markdown.split("## How to read this")[0]  # nothing is known of noise
    assert "697.1 %" not in page


def test_all_parts_are_there(out: Path) -> None:
    pictures = {"rounds.png", "parameters.png", "flops.png", "speed.png"}
    texts = {"summary.json", "report.md", "report.html"}
    assert {path.name for path in out.iterdir()} == texts | pictures
    page, markdown = text_of(out / "report.html"), (out / "report.md").read_text()
    for words in (
        "keeps clip and convnext of the 5 experts, with a score of 31.0 % (27.0 to 35.0)",
        "started from clip with 24.0 % (20.0 to 28.0)",
        "noise-aware: nothing is better than what there is.",
        "the decision would have been another without text",
        "without any one of the 4 tasks it is the same",
        "dropped at 11.0",
        "not distinguishable",
        "25 % of the steps",
        "+0.67",
        "2,400 training steps instead of 6,000 steps without reuse: 2.5 x fewer",
        "sha256:34",
        "Some CPU, 2 cores",
        "30 min 30 s",
    ):
        assert words in page, words
        assert words in markdown, words
    assert "name: noise_aware" in page  # the settings


def test_tables_hold_the_numbers(out: Path) -> None:
    lines = (out / "report.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| **+convnext** | **31.0**"))
    cells = [cell.strip(" *") for cell in row.strip("|").split("|")]
    assert cells[:7] == [
        "+convnext",
        "31.0",
        "27.0 to 35.0",
        "+7.0",
        "+5.0 to +9.0",
        "better",
        "0, 1",
    ]
    worse = next(line for line in lines if line.startswith("| +eva02 | 20.0"))
    assert "| \N{MINUS SIGN}4.0 | \N{MINUS SIGN}6.0 to \N{MINUS SIGN}2.0 | worse |" in worse
    tasks = next(line for line in lines if line.startswith("| clip | 9.0"))
    assert tasks == "| clip | 9.0 | 19.0 | 29.0 | 39.0 |"


def test_failures_are_told_and_never_run(out: Path) -> None:
    raw = (out / "report.html").read_text()
    assert not re.search(r"<script|<link|@import|(src|href)=[\"']https?:|url\(http", raw)
    assert "&lt;script&gt;alert(1)" in raw and "stages/9f/log.txt" in raw
    assert "killed | by *hand*\nOUT/log.txt" in raw  # known from the ledger alone
    markdown = (out / "report.md").read_text()
    assert "<script" not in re.sub(r"```.*?```", "", markdown, flags=re.DOTALL).replace("\\<", "")
    assert "7.0 \\<points\\> than" in markdown
    section = markdown.split("## Failed trials")[1].split("\n## ")[0]
    assert "clip+sam:" not in section  # it failed once, and its last row says that it is done


def test_pictures_have_words(out: Path) -> None:
    raw = (out / "report.html").read_text()
    labels = [html.unescape(label) for label in re.findall(r'role="img" aria-label="([^"]+)"', raw)]
    assert len(labels) == raw.count("<svg") == 4
    assert "clip+sam 25.0 % (21.0 to 29.0)" in labels[0] and "clip+pix2struct dropped" in labels[0]
    assert "kept clip+convnext; round 2" in labels[0] and labels[0].endswith("stopped.")
    for name in ("rounds", "parameters", "flops", "speed"):
        assert f"]({name}.png)" in (out / "report.md").read_text()
        with Image.open(out / f"{name}.png") as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        blue = [int(PATH[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == blue).all(axis=1).sum() > 30, name


def test_the_page_fits_a_phone(out: Path) -> None:
    """What is wider than a phone scrolls by itself: nothing else has a width of its own."""
    raw = (out / "report.html").read_text()
    assert 'name="viewport" content="width=device-width' in raw
    assert raw.count("<table") == raw.count('<div class="scroll">\n<table')
    wide = to_html(build_document(paper_choice(), SearchFacts("Fig. 4", POOL, BASE)))
    assert wide.count('<div class="scroll wide">') == 1  # of many rounds


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
    wrong = markdown_of(choice, replace(slow, ledger=(*rows, more)))  # another trial tells
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


def test_a_report_so_far_says_so(choice: Choice, facts: SearchFacts, tmp_path: Path) -> None:
    so_far = replace(choice, rounds=choice.rounds[:1])
    write_report(so_far, replace(facts, finished=False), tmp_path)
    assert (
        "So far, after 1 round, the search keeps clip and convnext"
        in (tmp_path / "report.md").read_text()
    )


def test_sections_without_content_are_left_out(tmp_path: Path) -> None:
    choice = paper_choice()
    bare = [
        replace(
            each,
            candidates=tuple(replace(c, cost=Cost()) for c in each.candidates),
            incumbent=each.incumbent and replace(each.incumbent, cost=Cost()),
        )
        for each in choice.rounds
    ]
    paths = write_report(
        replace(choice, rounds=tuple(bare)), SearchFacts("bare", POOL, BASE), tmp_path
    )
    assert {path.name for path in paths} == {
        "summary.json",
        "report.md",
        "report.html",
        "rounds.png",
    }
    titles = re.findall("^## (.+)", (tmp_path / "report.md").read_text(), flags=re.MULTILINE)
    assert titles == ["Rounds", "How to read this"]


def test_looking_back_is_no_round_of_its_own(choice: Choice, facts: SearchFacts) -> None:
    first, second = choice.rounds
    start, now = first.incumbent, second.incumbent
    assert start is not None and now is not None
    back = Round(3, now, (start,), start.members, "Looking back, clip is as good.")
    looked = replace(choice, rounds=(*choice.rounds, back), chosen=start.members)
    markdown = markdown_of(looked, facts)
    assert "### Looking back keeps clip" in markdown and "Round 3" not in markdown
    assert "- **2** rounds" in markdown
    assert "ended at" in markdown.split("### Looking back")[1]


def test_the_front_holds_what_nothing_beats() -> None:
    scored = scored_mixtures(paper_choice())

    def on_front(of: Any, less: bool = True) -> list[str]:
        return [short_title(each.members, BASE) for each in pareto_front(scored, of, less)]

    cheap = ["clip+convnext", "+eva02", "+pix2struct+eva02", "+sam+pix2struct+eva02"]
    assert on_front(lambda cost: cost.parameters) == cheap
    fast = on_front(lambda cost: cost.images_per_second, less=False)
    assert fast == ["clip+convnext", "+dinov2", *cheap[1:]]
    wrong = on_front(lambda cost: cost.images_per_second)  # as if slow were good
    assert wrong != fast
    assert on_front(lambda cost: None) == []


def test_of_two_with_the_same_numbers_both_are_on_the_front() -> None:
    twins = [
        Candidate((name,), None, Interval(score), None, None, cost=Cost(price))
        for name, score, price in (("a", 0.5, 2.0), ("b", 0.5, 2.0), ("c", 0.5, 3.0))
    ]
    assert [each.members[0] for each in pareto_front(twins, lambda c: c.parameters)] == ["a", "b"]


def test_shares_are_shown_in_per_cent_and_other_scores_as_they_are(choice: Choice) -> None:
    assert Scale.of(choice).whole(Interval(0.31, 0.27, 0.35)) == "31.0 % (27.0 to 35.0)"
    assert Scale.of(paper_choice()).whole(Interval(697.1)) == "697.1"
