"""eval/experts/page.py: one file that holds all of it, for readers with and without eyes."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eagle_moe.scores.card import Score
from eval.experts import METRICS, read_measured
from eval.experts.words import show, show_again
from eval.items import read_items
from eval.page import INK
from tests.conftest import make_config
from tests.explained import EXPERTS, run, save
from tests.suites import write_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"), per_skill=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder, tiny_processor, suite) -> Path:
    out = tmp_path_factory.mktemp("out")
    alone = save(out / "clip", make_config(("clip-tiny",)), tiny_processor)
    run(tiny_folder, suite, out, images=4, retrained={"convnext": [alone]})
    return out


class Page(HTMLParser):
    """What a reader meets: images with their texts, and everything that could be a request."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.figures: list[str] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        if tag == "img":
            self.images.append(found)
        if found.get("role") == "img":
            self.figures.append(found["aria-label"])

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_holds_all_and_asks_for_nothing(finished, suite):
    text = (finished / "experts.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe"}
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    shown = read_items(suite, 4)
    assert len(page.images) == 4 * (1 + len(EXPERTS))
    for image in page.images:
        assert image["alt"]
        head, _, data = image["src"].partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (192, 192)
    for item in shown:
        assert item.question in page.words
        assert item.answer in page.words
    assert len(page.figures) == 3 * len(METRICS)
    assert all("convnext: total" in figure for figure in page.figures)
    assert page.words.count("mean over 5 reference images") >= 3
    assert "hints" in page.words
    assert "same sign" in page.words
    assert INK in text
    with Image.open(finished / "experts.png") as picture:
        assert picture.width > 1000


def test_a_page_without_images_and_retraining_leaves_those_parts_out(tiny_folder, suite, tmp_path):
    run(tiny_folder, suite, tmp_path, limit=3)
    page = Page((tmp_path / "experts.html").read_text(encoding="utf-8"))
    assert not page.images
    assert "Image by image" not in page.words
    assert "training again" not in page.words.replace("another training run", "")
    assert len(read_measured(tmp_path)) == 3


@pytest.mark.parametrize(
    ("metric", "score", "shown"),
    [
        ("accuracy", (0.124, 0.08, 0.161), ("+12", "8 to 16")),
        ("accuracy", (-0.001, -0.02, 0.004), ("0", "−2 to 0")),
        ("log_prob", (0.414, -0.3, 0.52), ("+0.41", "−0.30 to 0.52")),
    ],
)
def test_figures_are_shown_as_people_read_them(metric, score, shown):
    value, low, high = score
    assert show(metric, Score(value=value, low=low, high=high, n=9)) == shown


def test_what_single_runs_gave_stands_behind_their_mean():
    score = Score(value=0.124, low=0.08, high=0.161, n=9)
    assert show_again("accuracy", score, [0.124]) == "+12 (8 to 16)"
    assert show_again("accuracy", score, [-0.02, 0.268]) == "+12 (8 to 16); runs \u22122, +27"
