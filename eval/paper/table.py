"""Tables: scores beside the paper's, and the page about the benchmarks. Rendered from data only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from eagle_moe.schema import nearest
from eagle_moe.scores.card import Card
from eagle_moe.scores.score import TOTAL
from eval.page import markdown_table
from eval.paper.benchmarks import AVERAGED, BENCHMARKS, Benchmark, eagle_average
from eval.paper.published import Row, read_published

AVERAGE = "Eagle average"
FEW = 3
"""Cells with which a published row is of interest for its average alone."""


@dataclass
class Measured:
    """Of one model, in the paper's units: scores with intervals, and why others are missing."""

    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What a reader of the table must know, in sentences."""
        notes = [f"{name} was not run: {why}" for name, why in self.not_run.items()]
        try:
            eagle_average(self.scores)
        except ValueError as error:
            notes.append(f"No average: {error}")
        return notes


def measure(cards: Mapping[str, Card]) -> Measured:
    """What the cards of one model hold of the 18 benchmarks; other tasks are ignored.

    Raises `ValueError` if the cards are of more than one model, or one lacks its metric.
    """
    ours = {one.name: cards[one.task] for one in BENCHMARKS if one.task in cards}
    weights = {card.identity.weights_sha256: name for name, card in ours.items()}
    if len(weights) > 1:
        raise ValueError(
            f"the cards are of {len(weights)} models: {', '.join(weights.values())} have different "
            "weights. Evaluate one model into one folder."
        )
    measured = Measured()
    for one in BENCHMARKS:
        if one.name in ours:
            _add(measured, one, ours[one.name])
    return measured


def _add(measured: Measured, one: Benchmark, card: Card) -> None:
    if one.metric in card.not_run:
        measured.not_run[one.name] = card.not_run[one.metric]
        return
    if one.metric not in card.metrics:
        raise ValueError(
            f"card of {one.task}: it has no metric {one.metric}, but {', '.join(card.metrics)}."
        )
    score = card.metrics[one.metric][TOTAL]
    measured.scores[one.name] = one.factor * score.value
    if score.low is not None and score.high is not None:
        measured.intervals[one.name] = (one.factor * score.low, one.factor * score.high)


def find_rows(models: Sequence[str]) -> list[Row]:
    """Published rows of scores by their models; all of them for none named.

    Raises `ValueError` with the nearest names for one that there is not.
    """
    rows = {row.model: row for row in read_published() if len(row.scores) > FEW}
    for model in models:
        if model not in rows:
            raise ValueError(f'no row of scores was published of "{model}".{nearest(model, rows)}')
    return [rows[model] for model in models or rows]


def score_table(measured: Measured, published: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: every benchmark and the average, ours and of each published row."""
    heading = ["benchmark", "this model", "95 % interval", *(row.model for row in published)]
    rows = [
        [
            _marked(one),
            _score(one, measured.scores.get(one.name), "not run" * (one.name in measured.not_run)),
            _interval(one, measured.intervals.get(one.name)),
            *(_score(one, row.scores.get(one.name)) for row in published),
        ]
        for one in BENCHMARKS
    ]
    others = [f"{row.average:.1f}" if row.average else "" for row in published]
    rows.append([AVERAGE, _average(measured.scores), "", *others])
    return heading, rows


def _average(scores: Mapping[str, float]) -> str:
    if any(one.name not in scores for one in AVERAGED):
        return ""
    return f"{eagle_average(scores):.1f}"


def _marked(one: Benchmark) -> str:
    return f"{one.name} *" if one.averaged else one.name


def _digits(one: Benchmark) -> int:
    return 0 if one.best > 100 else 1


def _score(one: Benchmark, value: float | None, missing: str = "") -> str:
    return missing if value is None else f"{value:.{_digits(one)}f}"


def _interval(one: Benchmark, ends: tuple[float, float] | None) -> str:
    return "" if ends is None else " to ".join(f"{end:.{_digits(one)}f}" for end in ends)


def to_rich(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    table.add_column(heading[0], no_wrap=True)
    for name in heading[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


PAGE = """\
# The paper's benchmarks

<!-- Written by `python -m eval.paper`; a test compares. -->

```
python -m eval.run --model runs/mine --tasks paper --data data --out runs/scores/mine
python -m eval.paper runs/scores/mine
```

The first command asks the 18 benchmarks of the Eagle paper (arXiv 2408.15998), whose data sets lie
below `data` as [the page on evaluation](evaluation.md) says; the second prints the scores beside
the paper's, with `--markdown` for a page. None of them has been run here on real weights: what is
below is what the tasks are, and what was published.

## Tasks

{tasks}

\\* is one of the 11 of the **Eagle average**: each benchmark as a share of its best score, the mean
of these times 1000. It is computed only where all parts are there. Twenty points of MME, which
runs of one recipe may differ by, are 0.9 of it.

## Where today's tasks differ from the paper's

The paper's scores were made with a copy of lmms-eval of 2024. Only the questions, the words and the
lengths are set back here; scorers are those of lmms-eval 0.7.3 as they are, so that scores compare
with everybody's of today.

{deviations}

## What the paper published

Scores, in the paper's units:

{scores}

Averages. "Without VizWiz" is recomputed from the ten other parts: X4 and X5 have another VizWiz in
the README than their averages imply, probably of another split, while their other cells agree.
Where the rows of a table do not give its averages, what they give is shown.

{averages}
"""


def render_page() -> str:
    """`docs/benchmarks-paper.md`."""
    rows = read_published()
    return PAGE.format(
        tasks=markdown_table(
            ["benchmark", "task", "metric", "best"],
            [[_marked(one), f"`{one.task}`", one.metric, f"{one.best:g}"] for one in BENCHMARKS],
        ),
        deviations=markdown_table(
            ["benchmark", "the paper's", "lmms-eval 0.7.3", "undone by"], _deviations()
        ),
        scores=_published_scores(find_rows([])),
        averages=markdown_table(
            ["source", "model", "printed", "its parts give", "without VizWiz", "VizWiz left"],
            [_average_row(row) for row in rows if row.average is not None],
        ),
    )


def _deviations() -> list[list[str]]:
    return [
        [one.name, of.paper, of.today, of.undone_by] for one in BENCHMARKS for of in one.deviations
    ]


def _published_scores(rows: Sequence[Row]) -> str:
    heading = ["benchmark", *(f"{row.model} ({row.source})" for row in rows)]
    cells = [
        [one.name, *(_score(one, row.scores.get(one.name)) for row in rows)] for one in BENCHMARKS
    ]
    return markdown_table(heading, cells)


def _average_row(row: Row) -> list[str]:
    found = (row.average, None if row.follows else row.recomputed, row.without_vizwiz, row.vizwiz)
    return [row.source, row.model, *("" if one is None else f"{one:.1f}" for one in found)]
