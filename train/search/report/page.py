"""The report as one HTML file with its pictures in it, on the page that all our reports share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from eval.page import render, to_svg
from train.search.report.blocks import Document, Picture

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def to_html(document: Document) -> str:
    """No script, no request; every text is escaped."""
    tools = {"kind": _kind, "svg": _svg, "soft": _soft}
    return render(TEMPLATE, title=document.title, document=document, **tools)


def _kind(block: Any) -> str:
    return type(block).__name__.lower()


def _svg(picture: Picture) -> str:
    return to_svg(picture.name, picture.draw, picture.size)


def _soft(text: str) -> str:
    """The name of a mixture may break after each of its experts."""
    return re.sub(r"(?<=\w)\+(?=\w)", "+\N{ZERO WIDTH SPACE}", text)
