"""A search's decisions and facts -> the files of its report."""

from __future__ import annotations

import json
import os
from pathlib import Path

from eval.page import to_png
from train.search.report.content import build_document
from train.search.report.facts import SearchFacts
from train.search.report.markdown import to_markdown
from train.search.report.page import to_html
from train.search.report.summary import SUMMARY, summarise
from train.search.rounds import Choice

PAGE, MARKDOWN = "report.html", "report.md"


def write_report(choice: Choice, facts: SearchFacts, out: str | Path) -> list[Path]:
    """Write the files of the report into folder `out`, each whole or not at all; their paths.

    - `report.html`: with everything in it. `report.md`: with its pictures beside it (`rounds.png`,
      `parameters.png`, `flops.png`, `speed.png`, as far as there is something to draw).
    - `summary.json`: see `train.search.report.summary`.

    The same decisions and facts give the same bytes. What the clock decides is in the last section
    and in `speed.png` alone. After a round, `choice` holds the rounds so far, `chosen` is what they
    have led to, and `facts.finished` is False.
    """
    out = Path(out)
    document = build_document(choice, facts)
    files = {f"{each.name}.png": to_png(each.draw, each.size) for each in document.pictures}
    summary = json.dumps(summarise(choice, facts), indent=2, allow_nan=False) + "\n"
    texts = {SUMMARY: summary, MARKDOWN: to_markdown(document), PAGE: to_html(document)}
    files |= {name: text.encode() for name, text in texts.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        beside = out / f"{name}.part"
        beside.write_bytes(content)
        os.replace(beside, out / name)
    return [out / name for name in files]
