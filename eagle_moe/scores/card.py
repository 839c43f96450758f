"""A score as it is kept: `card.json` beside `items.jsonl.gz`, recounted whenever it is read.

A run leaves one folder per task, `OUT/<task>/`, which `Card.load` and `read_answers` read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from eagle_moe.schema import Schema
from eagle_moe.scores.answer import ITEMS, Answer, read_answers
from eagle_moe.scores.identity import Identity
from eagle_moe.scores.score import TOTAL, Estimate, accuracy_by_skill, bootstrap, is_correct

CARD = "card.json"
SKILLS = "eagle_skills"
"""The built-in suite as a task of the harness; its one metric is `ACCURACY`."""
ACCURACY = "accuracy"


class Score(Schema):
    """A number over `n` items, with its 95 % interval [`low`, `high`] where one is known.

    In the metric's own unit: fractions of one for most, points for MME, percent for MMBench.
    """

    value: float = Field(allow_inf_nan=False)
    low: float | None = Field(None, allow_inf_nan=False)
    high: float | None = Field(None, allow_inf_nan=False)
    n: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError("give both ends of the interval, or neither")
        low, high = self.low, self.high
        if low is not None and high is not None and not low <= self.value <= high:
            raise ValueError("expected low <= value <= high")
        return self

    @classmethod
    def of(cls, estimate: Estimate) -> Self:
        return cls(value=estimate.mean, low=estimate.low, high=estimate.high, n=estimate.n)


class Card(Schema):
    """What a model scored on one task, what produced it, and how long answering took.

    - `metrics`: metric -> `{"total": ..., part: ...}`. A part is a skill or a category of the
      task; most tasks have none.
    - `primary`: the metric that tables show unless they ask for another.
    - `means`: the metrics that are means of the items' scores; these are recounted.
    - `not_run`: metric -> why it has no number, such as a judge without a key.
    - `notes`: what a reader of the number must know, in sentences.
    - `seconds`: spent on the last run's answers alone, without loading the model;
      `questions_per_second` is their number over that time.
    - `images_seen`, `images_encoded`: of the last run; an image seen again is not encoded again.
    """

    model: str
    primary: str
    metrics: dict[str, dict[str, Score]]
    means: list[str]
    not_run: dict[str, str] = {}
    notes: list[str] = []
    identity: Identity
    seconds: float = Field(ge=0, allow_inf_nan=False)
    questions_per_second: float = Field(ge=0, allow_inf_nan=False)
    images_seen: int = Field(0, ge=0)
    images_encoded: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.primary not in self.metrics and self.primary not in self.not_run:
            raise ValueError(f'its primary metric "{self.primary}" is not among its metrics')
        for metric, parts in self.metrics.items():
            if TOTAL not in parts:
                raise ValueError(f"metric {metric} has no `{TOTAL}`")
            if metric in self.means and len(parts) > 1:
                check_total(parts)
        return self

    @property
    def task(self) -> str:
        return self.identity.task.name

    @property
    def score(self) -> Score | None:
        """The primary metric's total; None if it was not run."""
        return self.metrics[self.primary][TOTAL] if self.primary in self.metrics else None

    @property
    def accuracy(self) -> dict[str, Estimate]:
        """Of the built-in suite: `{"total": ..., skill: ...}`."""
        return {
            part: Estimate(mean=score.value, low=score.low, high=score.high, n=score.n)
            for part, score in self.metrics[ACCURACY].items()
        }

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / CARD, self.dump())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `folder/card.json` and recount it from `folder/items.jsonl.gz`.

        Raises `FileNotFoundError` without either file, and `ValueError` if a number of the card
        does not follow from the items, or a score of the built-in suite from its prediction.
        """
        folder = Path(folder)
        for name in (CARD, ITEMS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: no such file. Run `python -m eval.run`.")
        try:
            data = json.loads((folder / CARD).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder / CARD}: not valid JSON: {error}") from None
        card = cls.parse(data, str(folder / CARD))
        answers = read_answers(folder)
        if card.task == SKILLS:
            check_skills(answers)
        recounted = count(answers, card.means)
        for metric in card.means:
            _compare(str(folder / CARD), metric, card.metrics[metric], recounted[metric])
        return card


def count(answers: Sequence[Answer], metrics: Iterable[str]) -> dict[str, dict[str, Score]]:
    """Means of the items' scores, in total and per part; an item without a score is left out.

    Raises `ValueError` for a metric that no item has a score of.
    """
    return {metric: _count(answers, metric) for metric in metrics}


def _count(answers: Sequence[Answer], metric: str) -> dict[str, Score]:
    scored = [(one.part, one.scores[metric]) for one in answers if metric in one.scores]
    values = [value for _, value in scored]
    if not values:
        raise ValueError(f"no item has a score of the metric {metric}")
    bounds = (min(0.0, *values), max(1.0, *values))
    if any(part for part, _ in scored):
        estimates = accuracy_by_skill([part for part, _ in scored], values, bounds)
    else:
        estimates = {TOTAL: bootstrap(values, bounds)}
    return {part: Score.of(estimate) for part, estimate in estimates.items()}


def check_skills(answers: Sequence[Answer]) -> None:
    """Raise `ValueError` if an item of the built-in suite is not as right as it says."""
    for one in answers:
        if one.scores != {ACCURACY: float(is_correct(one.prediction, one.target))}:
            raise ValueError(
                f'item "{one.id}": its scores are {one.scores}, but the prediction is '
                f'"{one.prediction}" and the answer "{one.target}".'
            )


def check_total(parts: Mapping[str, Score] | Mapping[str, Estimate]) -> None:
    """Raise `ValueError` unless the total is the mean of the parts weighted by items."""
    counted = {
        name: (one.value if isinstance(one, Score) else one.mean, one.n)
        for name, one in parts.items()
    }
    if TOTAL not in counted or len(counted) == 1:
        raise ValueError(f"a score needs `{TOTAL}` and at least one part")
    total, asked = counted.pop(TOTAL)
    n = sum(n for _, n in counted.values())
    mean = sum(value * n for value, n in counted.values()) / n
    if asked != n or not math.isclose(total, mean, abs_tol=1e-9):
        raise ValueError(
            f"the total ({total:.6f} of {asked}) does not follow from the parts ({mean:.6f} of {n})"
        )


def _compare(
    source: str, metric: str, told: Mapping[str, Score], found: Mapping[str, Score]
) -> None:
    for part in sorted(told.keys() | found.keys()):
        if not _same(told.get(part), found.get(part)):
            raise ValueError(
                f"{source}: {metric}, `{part}` is {told.get(part)}, but the items beside it give "
                f"{found.get(part)}. One of the files was changed: evaluate again."
            )


def _same(first: Score | None, second: Score | None) -> bool:
    """Equal up to what another version of NumPy may resample: a point in the interval's ends."""
    if first is None or second is None or first.n != second.n:
        return False
    ends = ((first.low, second.low), (first.high, second.high))
    return math.isclose(first.value, second.value, abs_tol=1e-9) and all(
        one is None or other is None or math.isclose(one, other, rel_tol=0.01, abs_tol=0.01)
        for one, other in ends
    )


def find_cards(out: str | Path) -> dict[str, Card]:
    """Task -> card of every task that is finished in `out`, by name. Raises as `Card.load`."""
    folders = sorted(path.parent for path in Path(out).glob(f"*/{CARD}"))
    return {folder.name: Card.load(folder) for folder in folders}


def write_json(path: Path, data: Any) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)
