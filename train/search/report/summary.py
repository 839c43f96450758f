"""`summary.json`: all of a report but the ledger, to be read by programs and rendered again.

    chosen, rounds, strategy, rule      the decisions (`train.search.rounds.Choice`)
    cost                                steps and pre-alignments, done and saved (`facts.Reuse`)
    title, pool, base, finished, settings, fingerprints, versions, machine
    clock                               seconds, notes, and images/s per mixture

All that the clock decides is under `clock`: the rest is equal in two like searches on one machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from train.search.ledger import LEDGER, Ledger
from train.search.report.facts import SearchFacts
from train.search.rounds import Choice
from train.search.rules import named

SUMMARY = "summary.json"
SPEEDS = "images_per_second"
DECISIONS = ("chosen", "rounds", "strategy", "rule")


def summarise(choice: Choice, facts: SearchFacts) -> dict[str, Any]:
    """The content of `summary.json`."""
    decisions, about = choice.dump(), facts.dump()
    clock = {**about.pop("clock"), "notes": about.pop("notes")}
    reuse = about.pop("reuse")
    speeds: dict[str, float] = {}
    for candidate in _candidates(decisions):
        speed = candidate["cost"].pop(SPEEDS)
        if speed is not None:
            speeds[named(candidate["members"])] = speed
    ends = {"clock": {**clock, SPEEDS: dict(sorted(speeds.items()))}}
    return {**decisions, "cost": reuse, **about, **ends}


def read_summary(out: str | Path) -> tuple[Choice, SearchFacts]:
    """What `write_report` was given, from the files in folder `out`.

    Raises `FileNotFoundError`, or `ValueError` naming the file and what is wrong in it.
    """
    path = Path(out, SUMMARY)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Give the folder that a search wrote into.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        decisions = {key: data.pop(key) for key in DECISIONS}
        clock = data.pop("clock")
        speeds, notes = clock.pop(SPEEDS), clock.pop("notes")
        for candidate in _candidates(decisions):
            candidate["cost"][SPEEDS] = speeds.get(named(candidate["members"]))
        ledger = Ledger(Path(out, LEDGER)).rows
        told = {"reuse": data.pop("cost"), "clock": clock, "notes": notes, "ledger": ledger}
        choice = TypeAdapter(Choice).validate_python(decisions)
        facts = TypeAdapter(SearchFacts).validate_python({**data, **told})
    except (json.JSONDecodeError, ValidationError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not what a search writes: {error!r}.") from None
    return choice, facts


def _candidates(decisions: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for each in decisions["rounds"]:
        yield from filter(None, (each["incumbent"], *each["candidates"]))
