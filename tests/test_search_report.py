"""train/search/report: all that was decided is on the page, and nothing that was not."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.mini_search import mini_choice, mini_facts
from tests.paper_search import BASE, FIG_4, POOL, paper_choice
from train.search.report import SearchFacts, write_report
from train.search.report.content import build_document
from train.search.report.figures import PATH
from train.search.report.markdown import to_markdown
from train.search.report.mixtures import Scale, pareto_front, scored_mixtures, short_title
from train.search.report.page import to_html
from train.search.rounds import Candidate, Choice, Interval, Round
from train.search.trial import Cost


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
    markdown = to_markdown(build_document(looked, facts))
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
