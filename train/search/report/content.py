"""A search's decisions and facts -> the document of its report."""

from __future__ import annotations

from train.search.report import evidence, origin
from train.search.report.blocks import Block, Document, Section, Terms, Text, Tiles
from train.search.report.facts import SearchFacts
from train.search.report.mixtures import Scale, is_look_back, scored_mixtures
from train.search.rounds import Candidate, Choice

TERMS = (
    (
        "Score",
        "The mean over tasks of the mean over their items, so that every task counts once. Its "
        "interval says how much other items, and other seeds where there are several, would move "
        "it. The sentences of the rounds have scores as the search computes them, where 1 is all.",
    ),
    (
        "Gain and verdict",
        "The score minus that of the mixture which the round started from, item by item. Better or "
        "worse: its 95 % interval lies on one side of zero. Not distinguishable: it does not, and "
        "the difference may be luck.",
    ),
    (
        "Leave one task out",
        "The round is decided again without each task in turn. A decision that changes hangs on "
        "that one task.",
    ),
    (
        "Rank agreement",
        "Kendall's tau between the order by cheap trials and the order by full ones, over the "
        "mixtures that had both: 1 is the same order, 0 is none, -1 the reverse.",
    ),
    (
        "Without reuse",
        "What the same trials would have taken if each had pre-aligned its own experts and run all "
        "of its stages itself.",
    ),
)


def build_document(choice: Choice, facts: SearchFacts) -> Document:
    """All sections for which something is known, the clock's last."""
    scale = Scale.of(choice)
    sections = [
        *evidence.rounds(choice, scale),
        *evidence.tasks(choice, facts, scale),
        *evidence.costs(choice, facts, scale),
        *evidence.failures(choice, facts),
        *origin.spent(facts),
        _terms(),
        *origin.provenance(facts),
        *origin.by_the_clock(choice, facts, scale),
    ]
    return Document(facts.title, _opening(choice, facts, scale), sections)


def _opening(choice: Choice, facts: SearchFacts, scale: Scale) -> list[Block]:
    blocks: list[Block] = [Text(_headline(choice, facts, scale)), Tiles(_tiles(choice, facts))]
    blocks.append(Text(_setting(choice, facts), faint=True))
    return blocks


def _headline(choice: Choice, facts: SearchFacts, scale: Scale) -> str:
    known = {each.members: each for each in scored_mixtures(choice)}
    kept, start = known.get(choice.chosen), _start(choice)
    count = len(choice.rounds)
    so_far = (
        f"So far, after {count} round{'s' * (count != 1)}, the" if not facts.finished else "The"
    )
    text = f"{so_far} search keeps {_listed(choice.chosen)} of the {len(facts.pool)} experts"
    if kept is not None and kept.score is not None:
        text += f", with a score of {scale.whole(kept.score)}"
    if start is None or start.score is None:
        return f"{text}."
    if start.members == choice.chosen:
        return f"{text}: what it started from."
    return f"{text}. It started from {_listed(start.members)} with {scale.whole(start.score)}."


def _start(choice: Choice) -> Candidate | None:
    """What the search started from; None if from single experts or from nothing."""
    return choice.rounds[0].incumbent if choice.rounds else None


def _tiles(choice: Choice, facts: SearchFacts) -> tuple[tuple[str, str], ...]:
    rounds = [each for each in choice.rounds if not is_look_back(choice, each)]
    counts = {"round": len(rounds), "trial": len(facts.last_rows)}
    tiles = [(str(n), f"{name}{'s' * (n != 1)}") for name, n in counts.items()]
    tiles.insert(0, (f"{len(choice.chosen)} of {len(facts.pool)}", "experts kept"))
    if facts.reuse is not None:
        tiles.append((f"{facts.reuse.steps:,}", "training steps"))
        if facts.reuse.steps:
            times = facts.reuse.steps_without_reuse / facts.reuse.steps
            tiles.append((f"{times:.1f} x", "fewer steps by reuse"))
    return tuple(tile for tile in tiles if tile[0] != "0")


def _setting(choice: Choice, facts: SearchFacts) -> str:
    start = f"starting from {_listed(facts.base)}" if facts.base else "starting from single experts"
    pool = ", ".join(facts.pool)
    rule = choice.rule.replace("_", "-")
    text = f"Pool: {pool}; {start}. Strategy: {choice.strategy}. Rule: {rule}."
    return f"{text} {facts.machine}." if facts.machine else text


def _listed(members: tuple[str, ...]) -> str:
    *first, last = members
    return f"{', '.join(first)} and {last}" if first else last


def _terms() -> Section:
    return Section("terms", "How to read this", [Terms(TERMS)])
