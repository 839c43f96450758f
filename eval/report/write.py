"""Results -> `report.html`, `report.png`, `summary.json`, and a table in the terminal."""

from __future__ import annotations

import os
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from eagle_moe.scores.card import write_json
from eagle_moe.scores.score import TOTAL
from eval.report import story
from eval.report.page import render_page
from eval.report.poster import draw_poster
from eval.report.results import DemoResults, summarise

PAGE, POSTER, SUMMARY = "report.html", "report.png", "summary.json"


def write_report(results: DemoResults, out: str | Path) -> Path:
    """Write the three files into folder `out`; return the path of the page."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    page = render_page(results)
    (out / f"{PAGE}.part").write_text(page, encoding="utf-8")
    draw_poster(results, out / f"{POSTER}.part")
    for name in (PAGE, POSTER):
        os.replace(out / f"{name}.part", out / name)
    write_json(out / SUMMARY, summarise(results))
    return out / PAGE


def print_summary(results: DemoResults, console: Console | None = None) -> None:
    """Accuracy per skill of every model, and the mixture's lead, in the terminal."""
    console = console or Console()
    table = Table(title="right, in % (95 % interval)", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    heading, rows = story.accuracy_table(results.accuracy)
    for name in heading[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == TOTAL else "")
    console.print(table)
    for sentence in story.lead_sentences(results.lead):
        console.print(sentence)
