"""The part of the report that says what was decided, and on which evidence."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from eval.page import show_large
from train.search.report import figures
from train.search.report.blocks import Block, Code, Picture, Pictures, Row, Section, Table, Text
from train.search.report.facts import SearchFacts
from train.search.report.mixtures import (
    NONE,
    Scale,
    all_candidates,
    change_title,
    is_look_back,
    pareto_front,
    ranked_mixtures,
    scored_mixtures,
    short_title,
)
from train.search.rounds import Candidate, Choice, Round
from train.search.rules import named
from train.search.trial import Cost

PANEL = (4.2, 3.0)
"""Inches of a picture of score against cost."""


@dataclass(frozen=True)
class Price:
    """One cost to set scores against. `less`: whether less of it is better."""

    name: str
    title: str
    of: Callable[[Cost], float | None]
    less: bool = True


PARAMETERS = Price("parameters", "parameters", lambda cost: cost.parameters)
FLOPS = Price("flops", "FLOP per image", lambda cost: cost.flops)
SPEED = Price("speed", "images per second", lambda cost: cost.images_per_second, less=False)


def rounds(choice: Choice, scale: Scale) -> list[Section]:
    """The picture of all rounds, then each with its reason and its candidates."""
    opening: list[Block] = []
    if (picture := _rounds_picture(choice, scale)) is not None:
        opening = [_legend(choice), Pictures((picture,))]
    return [
        Section("rounds", "Rounds", opening),
        *(_round(each, scale, is_look_back(choice, each)) for each in choice.rounds),
    ]


def _rounds_picture(choice: Choice, scale: Scale) -> Picture | None:
    if not scored_mixtures(choice):
        return None
    if all(each.changed for each in choice.rounds[0].candidates if choice.rounds[0].incumbent):
        draw = partial(figures.draw_rounds, choice=choice, scale=scale)
        size = figures.rounds_size(choice)
    else:
        ranked = ranked_mixtures(choice)
        draw = partial(figures.draw_ranking, ranked=ranked, chosen=choice.chosen, scale=scale)
        size = (7.0, 0.8 + 0.24 * len(ranked))
    spoken = "; ".join(
        f"round {each.number}: "
        + ", ".join(
            f"{named(c.members)} {scale.whole(c.score) if c.score else c.verdict or 'no score'}"
            for c in each.candidates
        )
        + f"; {'kept ' + named(each.chosen) if each.chosen else 'stopped'}"
        for each in choice.rounds
    )
    return Picture("rounds", f"Scores by round. {spoken}.", draw, size)


def _legend(choice: Choice) -> Text:
    noise = any(each.score and each.score.low is not None for each in all_candidates(choice))
    lines = (
        "Lines are 95 % intervals. A ring is orange if the mixture is worse than what its round "
        "started from, blue if it is better, and grey if noise cannot tell."
        if noise
        else "Nothing is known of the noise in these scores, so there are no intervals."
    )
    kept = "A filled dot is what a round went on with; the one with a circle is what is kept."
    return Text(f"{kept} {lines}", faint=True)


def _round(decided: Round, scale: Scale, back: bool) -> Section:
    blocks: list[Block] = [Text(decided.reason)]
    if (hinges := _hinges(decided)) is not None:
        blocks.append(Text(hinges))
    ranked = sorted(decided.candidates, key=lambda c: -c.score.mean if c.score else 1e9)
    rows = []
    if (start := decided.incumbent) is not None:
        said = "ended at" if back else "started from"
        rows = [_candidate_row(start, decided, scale, named(start.members), said)]
    for each in ranked:
        title = named(each.members) if back else change_title(each.members, start)
        rows.append(_candidate_row(each, decided, scale, title, _verdict(each, scale)))
    numbers = (scale.heading("score"), "95 %", scale.heading("gain"), "95 %", "verdict", "seeds")
    headings = ("mixture", *numbers, "parameters", "FLOP/image")
    blocks.append(_without_empty(Table(headings, tuple(rows))))
    if decided.proxies:
        blocks.append(_proxies(decided))
    title = "Looking back" if back else f"Round {decided.number}"
    kept = f"keeps {named(decided.chosen)}" if decided.chosen else "stops the search"
    return Section(f"round-{decided.number}", f"{title} {kept}", blocks, level=3)


def _hinges(decided: Round) -> str | None:
    """Whether one task carries the decision; None where there are no tasks to leave out."""
    tasks = {task for each in decided.candidates for task in each.tasks or {}}
    if decided.hinges_on:
        carried = ", ".join(decided.hinges_on)
        return f"Leave one task out: the decision would have been another without {carried}."
    if len(tasks) > 1:
        return f"Leave one task out: without any one of the {len(tasks)} tasks it is the same."
    return None


def _candidate_row(
    candidate: Candidate, decided: Round, scale: Scale, title: str, verdict: str
) -> Row:
    cells = (
        title,
        scale.score(candidate.score.mean if candidate.score else None),
        scale.ends(candidate.score, scale.score),
        scale.gain(candidate.gain.mean if candidate.gain else None),
        scale.ends(candidate.gain, scale.gain),
        verdict,
        ", ".join(map(str, candidate.seeds)) or NONE,
        _large(candidate.cost.parameters),
        _large(candidate.cost.flops),
    )
    return Row(cells, strong=candidate.members == decided.chosen)


def _verdict(candidate: Candidate, scale: Scale) -> str:
    if candidate.verdict == "dropped" and candidate.proxy is not None:
        return f"dropped at {scale.score(candidate.proxy)}"
    return candidate.verdict or NONE


def _without_empty(table: Table) -> Table:
    """Without the columns in which nothing is known."""
    kept = [
        at for at in range(len(table.headings)) if any(row.cells[at] != NONE for row in table.rows)
    ]
    headings = tuple(table.headings[at] for at in kept)
    rows = [replace(row, cells=tuple(row.cells[at] for at in kept)) for row in table.rows]
    return Table(headings, tuple(rows))


def _large(count: float | None) -> str:
    return NONE if count is None else show_large(count).strip()


def _proxies(decided: Round) -> Table:
    rows = tuple(
        Row(
            (
                f"{100 * each.budget:.3g} % of the steps",
                str(each.candidates),
                str(each.kept),
                NONE if each.rank_agreement is None else f"{each.rank_agreement:+.2f}",
            )
        )
        for each in decided.proxies
    )
    headings = ("cheap trials first", "tried", "kept", "rank agreement with full trials")
    return Table(headings, rows)


def tasks(choice: Choice, facts: SearchFacts, scale: Scale) -> list[Section]:
    """Every mixture's score on every task; no section where tasks are not known."""
    scored = [each for each in scored_mixtures(choice) if each.tasks]
    names = list(dict.fromkeys(task for each in scored for task in each.tasks or {}))
    if not names:
        return []
    lines = [[(each.tasks or {}).get(name) for name in names] for each in scored]
    ends = [_ends([line[i] for line in lines]) for i in range(len(names))]
    rows = tuple(
        Row(
            (short_title(each.members, facts.base), *(scale.score(value) for value in line)),
            strong=each.members == choice.chosen,
            shades=(None, *(_shade(v, *ends[i]) for i, v in enumerate(line))),
        )
        for each, line in zip(scored, lines, strict=True)
    )
    text = "Every task counts once in a score. Darker is higher within a task."
    blocks: list[Block] = [Text(text, faint=True), Table(("mixture", *names), rows)]
    return [Section("tasks", scale.heading("Score by task"), blocks)]


def _ends(values: list[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return min(known), max(known)


def _shade(value: float | None, low: float, high: float) -> float | None:
    return None if value is None or high <= low else (value - low) / (high - low)


def costs(choice: Choice, facts: SearchFacts, scale: Scale) -> list[Section]:
    """Score against what is known of a mixture before it runs: parameters and FLOPs."""
    blocks = price_blocks(choice, facts, scale, (PARAMETERS, FLOPS))
    if not blocks:
        return []
    text = (
        "Experts, fusion and connector, without the language model. On the front are the mixtures "
        "than which no other scores as high at as low a cost."
    )
    return [Section("cost", "Score against cost", [Text(text, faint=True), *blocks])]


def price_blocks(
    choice: Choice, facts: SearchFacts, scale: Scale, prices: tuple[Price, ...]
) -> list[Block]:
    """Pictures and a table of the fronts by these costs, where they are known."""
    scored = ranked_mixtures(choice)
    fronts = {price: pareto_front(scored, price.of, price.less) for price in prices}
    prices = tuple(price for price in prices if fronts[price])
    if not prices:
        return []
    pictures = tuple(_price_picture(choice, facts, scale, price, fronts[price]) for price in prices)
    rows = tuple(
        Row(
            (
                short_title(each.members, facts.base),
                scale.score(each.score.mean if each.score else None),
                *(_large(price.of(each.cost)) for price in prices),
                ", ".join(price.title for price in prices if each in fronts[price]) or NONE,
            ),
            strong=each.members == choice.chosen,
        )
        for each in scored
    )
    titles = [price.title for price in prices]
    table = Table(("mixture", scale.heading("score"), *titles, "on the front by"), rows)
    return [Pictures(pictures), table]


def _price_picture(
    choice: Choice, facts: SearchFacts, scale: Scale, price: Price, front: list[Candidate]
) -> Picture:
    draw = partial(
        figures.draw_front,
        mixtures=scored_mixtures(choice),
        chosen=choice.chosen,
        base=facts.base,
        scale=scale,
        cost=price.of,
        title=f"score against {price.title}",
        less=price.less,
    )
    named = ", ".join(
        f"{short_title(each.members, facts.base)} ({_large(price.of(each.cost))}, "
        f"{scale.score(each.score.mean if each.score else None)})"
        for each in front
    )
    alt = f"Score against {price.title}; on the Pareto front: {named}."
    return Picture(price.name, alt, draw, PANEL)


def _first_line(said: str) -> str:
    return textwrap.shorten(said.partition("\n")[0], 80, placeholder=" ...")


def failures(choice: Choice, facts: SearchFacts) -> list[Section]:
    """Every mixture that failed, with what it said and where its log is."""
    errors: dict[str, str] = {}
    for candidate in all_candidates(choice):
        if candidate.error:
            errors[named(candidate.members)] = candidate.error
    for row in facts.last_rows:
        if row["status"] == "failed":
            said = "\n".join(filter(None, (row.get("error"), row.get("log"))))
            errors.setdefault(named(row["members"]), said)
    if not errors:
        return []
    text = "They were left out, and the search went on. A finished trial is never run again."
    codes = [Code(f"{mixture}: {_first_line(said)}", said) for mixture, said in errors.items()]
    return [Section("failed", "Failed trials", [Text(text, faint=True), *codes])]
