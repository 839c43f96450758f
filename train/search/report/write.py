"""A search's decisions and facts -> the files of its report."""

from __future__ import annotations

from pathlib import Path

from eval.card import write_json
from train.search.report.facts import SearchFacts
from train.search.report.summary import SUMMARY, summarise
from train.search.rounds import Choice


def write_report(choice: Choice, facts: SearchFacts, out: str | Path) -> list[Path]:
    """Write the files of the report into folder `out`, each whole or not at all; their paths.

    The same decisions and facts give the same bytes. After a round, `choice` holds the rounds so
    far, `chosen` is the last round's, and `facts.finished` is False.
    """
    out = Path(out)
    write_json(out / SUMMARY, summarise(choice, facts))
    return [out / SUMMARY]
