"""Search a table of given scores: to read a published one, to compare rules, to decide again.

    python -m train.search.replay TABLE.json --base clip,convnext --rule plain
    python -m train.search.replay runs/search-mini/ledger.jsonl --base clip --rule noise_aware

Prints the rounds and what is chosen; `--json OUT` writes both. docs/search-rules.md has more.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from train.search.given import GivenScores, read_scores
from train.search.pool import Pool
from train.search.rounds import Candidate, Choice, Interval, Round
from train.search.rules import NoiseAware, Plain, Rule, named
from train.search.strategies import Backward, Exhaustive, Greedy, Strategy, search
from train.search.trial import ABSENT

STRATEGIES: dict[str, Strategy] = {
    "greedy": Greedy(),
    "backward": Backward(),
    "exhaustive": Exhaustive(most=1023),  # looking up costs little
}
PIPED = 120
"""Columns where there is no terminal."""


def replay(
    table: GivenScores, base: Sequence[str], pool: Sequence[str], strategy: str, rule: Rule
) -> Choice:
    """Search `table`. An empty `pool` is all of its experts, in the order of their appearance.

    Raises `ValueError` for names that the table does not have, and if the base is not in it.
    """
    everything = Pool(table.names)
    for name in pool:
        everything.members([name], "pool")
    chosen_from = Pool(tuple(pool) or table.names, tuple(base))
    return search(chosen_from, STRATEGIES[strategy], rule, table, seeds=table.seeds)


def print_choice(choice: Choice, console: Console) -> None:
    """A table per round with its reason, then the choice."""
    for decided in choice.rounds:
        console.print(_round_table(decided))
        absent = [named(c.members) for c in decided.candidates if c.verdict == ABSENT]
        if absent:
            console.print(f"{ABSENT}: {', '.join(absent)}", style="dim", highlight=False)
        console.print(decided.reason, highlight=False)
        if decided.hinges_on:
            tasks = ", ".join(decided.hinges_on)
            console.print(f"Without any one of these tasks, another decision: {tasks}.")
        console.print()
    console.print(f"chosen: {', '.join(choice.chosen)}", style="bold", highlight=False)


def _round_table(decided: Round) -> Table:
    """Columns of which nothing is known are left out."""
    start = [decided.incumbent] if decided.incumbent else []
    present = [one for one in decided.candidates if one.verdict != ABSENT]
    ranked = sorted(present, key=lambda one: -one.score.mean if one.score else math.inf)
    shown = [*start, *ranked]
    highest = max((abs(one.score.mean) for one in shown if one.score), default=0.0)
    digits = 1 if highest > 100 else 2 if highest > 1 else 4
    rows = [_cells(one, digits) for one in shown]
    headings = ("mixture", "score", "95 %", "gain", "95 %", "verdict", "seeds")
    known = [n for n in range(len(headings)) if any(row[n] for row in rows)]
    table = Table(title=f"round {decided.number}", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("", *(headings[n] for n in known)):
        table.add_column(heading, justify="left" if heading in ("", "mixture") else "right")
    for one, row in zip(shown, rows, strict=True):
        mark = ">" if one.members == decided.chosen else ""
        table.add_row(mark, *(row[n] for n in known), style="bold" if mark else "")
    return table


def _cells(one: Candidate, digits: int) -> tuple[str, ...]:
    return (
        named(one.members),
        f"{one.score.mean:.{digits}f}" if one.score else "",
        _ends(one.score, f".{digits}f"),
        f"{one.gain.mean:+.{digits}f}" if one.gain else "",
        _ends(one.gain, f"+.{digits}f"),
        one.error if one.verdict == "failed" else one.verdict or "",
        ", ".join(map(str, one.seeds)) if len(one.seeds) > 1 else "",
    )


def _ends(interval: Interval | None, digits: str) -> str:
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f"{interval.low:{digits}} to {interval.high:{digits}}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 chosen, 2 an error that the message explains."""
    parser = argparse.ArgumentParser(
        prog="python -m train.search.replay", description="Search a table of given scores."
    )
    parser.add_argument("table", help="JSON list of rows, or the ledger.jsonl of a search")
    parser.add_argument("--base", type=_names, default=(), metavar="A,B", help="to start from")
    parser.add_argument("--pool", type=_names, default=(), metavar="A,B,C", help="in this order")
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="greedy")
    parser.add_argument("--rule", choices=["plain", "noise_aware"], default="plain")
    parser.add_argument("--level", type=float, help=f"of noise_aware, default {NoiseAware.level}")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write rounds and choice there")
    told = parser.parse_args(arguments)
    try:
        if told.level is not None and told.rule == "plain":
            raise ValueError("--level: rule plain has none. Add --rule noise_aware.")
        table = read_scores(told.table)
        every = len(table.seeds)  # they cost nothing here
        level = NoiseAware.level if told.level is None else told.level
        rule = Plain() if told.rule == "plain" else NoiseAware(level, first_seeds=every)
        choice = replay(table, told.base, told.pool, told.strategy, rule)
        if told.json is not None:
            told.json.parent.mkdir(parents=True, exist_ok=True)
            told.json.write_text(json.dumps(choice.dump(), indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    print_choice(choice, console if console.is_terminal else Console(width=PIPED))
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main())
