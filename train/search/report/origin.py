"""The part of the report that says what it cost, what it was made with, and what the clock said."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from eval.page import show_seconds
from train.search.report.blocks import Block, Code, Row, Section, Table, Text
from train.search.report.evidence import SPEED, price_blocks
from train.search.report.facts import Clock, Reuse, SearchFacts
from train.search.report.mixtures import NONE, Scale
from train.search.rounds import Choice
from train.search.rules import named

KEY = 16
"""Characters of a trial's key that are shown."""


def spent(facts: SearchFacts) -> list[Section]:
    """Training that was done, against that of a search which shares nothing."""
    if facts.reuse is None:
        return []
    blocks: list[Block] = [Text(_reuse_sentence(facts.reuse)), _reuse_table(facts.reuse)]
    return [Section("spent", "What it cost", blocks)]


def _reuse_sentence(reuse: Reuse) -> str:
    without = f"{reuse.steps_without_reuse:,} steps without reuse"
    if not reuse.steps:
        return f"No training step was needed: it would have been {without}."
    times = reuse.steps_without_reuse / reuse.steps
    return f"{reuse.steps:,} training steps instead of {without}: {times:.1f} x fewer."


def _reuse_table(reuse: Reuse) -> Table:
    counts = (
        ("training steps", reuse.steps, reuse.steps_without_reuse),
        ("pre-alignments", reuse.pre_alignments, reuse.pre_alignments_without_reuse),
        ("stages of mixtures", reuse.stages, reuse.stages_without_reuse),
    )
    rows = [Row((name, f"{done:,}", f"{alone:,}")) for name, done, alone in counts]
    found = f"{reuse.experts_found:,}"
    rows.append(Row(("experts found in the store", found, NONE)))
    return Table(("", "in this search", "without reuse"), tuple(rows))


def provenance(facts: SearchFacts) -> list[Section]:
    """All that the result depends on, and the ledger."""
    known = {**facts.fingerprints, **facts.versions}
    if facts.machine:
        known["machine"] = facts.machine
    blocks: list[Block] = []
    if known:
        rows = tuple(Row((name, value)) for name, value in known.items())
        blocks.append(Table(("", "what it was made with"), rows, words=True))
    if facts.settings:
        text = yaml.safe_dump(dict(facts.settings), sort_keys=False, allow_unicode=True)
        blocks.append(Code("Settings", text.rstrip()))
    if facts.ledger:
        blocks.append(_ledger_table(facts))
    return [Section("provenance", "Where it comes from", blocks)] if blocks else []


def _ledger_table(facts: SearchFacts) -> Table:
    rows = tuple(
        Row(
            (
                named(row["members"]),
                str(row.get("seed", NONE)),
                f"{100 * row.get('budget', 1):.3g} %",
                row["status"],
                NONE if row.get("score") is None else f"{row['score']:.4f}",
                f"{row['steps']:,}" if row.get("steps") is not None else NONE,
                row["key"][:KEY],
            )
        )
        for row in facts.last_rows
    )
    headings = ("mixture", "seed", "budget", "status", "score", "steps", "key")
    return Table(headings, rows, title=f"The ledger: {len(rows)} trials", folded=True)


def by_the_clock(choice: Choice, facts: SearchFacts, scale: Scale) -> list[Section]:
    """What differs from run to run, and so stands apart from everything else."""
    blocks: list[Block] = []
    seconds = _seconds_table(facts.clock, facts.ledger)
    if seconds.rows:
        blocks.append(seconds)
    blocks += [Text(note) for note in facts.notes]
    if speed := price_blocks(choice, facts, scale, (SPEED,)):
        text = (
            "Images per second through experts, fusion and connector, measured once per mixture on "
            "this machine, with whatever else it was doing then."
        )
        blocks += [Text(text, faint=True), *speed]
    if not blocks:
        return []
    opening = Text("Another run of the same search may differ here, and nowhere else.", faint=True)
    return [Section("clock", "By the clock", [opening, *blocks])]


def _seconds_table(clock: Clock, ledger: tuple[Mapping[str, object], ...]) -> Table:
    times = (
        ("from start to end", clock.wall),
        ("jobs, added up", clock.jobs),
        ("jobs without reuse, added up", clock.jobs_without_reuse),
    )
    rows = [(name, show_seconds(value)) for name, value in times if value is not None]
    rows += [
        (name, value)
        for name, value in (("started", clock.started), ("finished", clock.finished))
        if value
    ]
    if clock.jobs and clock.jobs_without_reuse:
        saved = clock.jobs_without_reuse / clock.jobs
        rows.append(("jobs without reuse / with it", f"{saved:.1f}"))
    return Table(("", "time"), tuple(Row(row) for row in rows))
