"""A table of given scores, to be searched like trials: a published one, or a search's ledger."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

from train.search.ledger import Ledger
from train.search.scores import score_of
from train.search.trial import ABSENT, UNKNOWN, Cost, Members, Result, Trial


@dataclass(frozen=True)
class Row:
    """A line of the table; `where` is its name in messages."""

    where: str
    result: Result

    @property
    def key(self) -> tuple[frozenset[str], int]:
        """The order of members in a table says nothing: the pool gives it."""
        return frozenset(self.result.trial.members), self.result.trial.seed


class GivenScores:
    """`RunTrials` that looks results up. What is not there fails as `ABSENT`.

    - `names`: experts in the order of their first appearance. `seeds`: all that occur, sorted.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        """Raises `ValueError` for rows that contradict each other or cannot be compared."""
        self._rows: dict[tuple[frozenset[str], int], Row] = {}
        self.names = tuple(dict.fromkeys(name for row in rows for name in row.result.trial.members))
        for row in rows:
            before = self._rows.get(row.key)
            if before is not None and _differ(before.result, row.result):
                raise ValueError(
                    f"{row.where}: the same members and seed as in {before.where}, but another "
                    'result. Keep one of the two, or give runs of different seeds a "seed" each.'
                )
            self._rows[row.key] = row
        _check_comparable([row for row in rows if not row.result.error])
        self.seeds = tuple(sorted({seed for _, seed in self._rows}))

    def __call__(self, trials: Sequence[Trial]) -> list[Result]:
        return [self._look_up(trial) for trial in trials]

    def _look_up(self, trial: Trial) -> Result:
        row = self._rows.get((frozenset(trial.members), trial.seed))
        if row is None:
            return Result(trial, error=ABSENT)
        found = row.result
        return Result(trial, found.score, found.items, found.cost, found.error)


def read_scores(path: str | Path) -> GivenScores:
    """Read a JSON list of rows, or the `ledger.jsonl` of a search.

    A row is `{"members": [...], "score": x}` or has `"items": {task: [score of each item]}`
    instead of, or beside, the score; and it may have a `"seed"` and a `"cost"` with `parameters`,
    `flops` and `images_per_second`. Of a ledger the last row of every full trial counts.

    Raises `FileNotFoundError`, or `ValueError` naming the file and the row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Give a table of scores in JSON.")
    if path.suffix == ".jsonl":
        lines = list(Ledger(path).by_key.values())
        data: Any = [line for line in lines if line.get("budget", 1) == 1]
    else:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}.") from None
    if not isinstance(data, list) or not data:
        raise ValueError(f'{path}: expected a list of rows like {{"members": [...], "score": 1}}.')
    return GivenScores([_read_row(row, f"{path}: row {n}") for n, row in enumerate(data, start=1)])


def _read_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f'{where}: {row!r}. Expected {{"members": [...], "score": ...}}.')
    members, seed = _read_members(row, where), row.get("seed", 0)
    if type(seed) is not int:
        raise ValueError(f"{where}: seed {seed!r}. Give a whole number.")
    trial, cost = Trial(members, seed), _read_cost(row.get("cost"), where)
    if row.get("status") == "failed":
        return Row(where, Result(trial, error=str(row.get("error") or "failed"), cost=cost))
    score, items = row.get("score"), _read_items(row.get("items"), where)
    if score is None and not items:
        raise ValueError(f'{where}: neither "score" nor "items". It has: {", ".join(row)}.')
    if score is not None and (type(score) is bool or not _is_number(score)):
        raise ValueError(f"{where}: score {score!r} is not a number.")
    result = Result(trial, score, items, cost)
    if items and score is not None and not _agrees(score, score_of(result)):
        raise ValueError(
            f"{where}: score {score} does not follow from the items, whose mean over tasks is "
            f'{score_of(result):.6g}. Leave "score" out, or correct one of the two.'
        )
    return Row(where, result)


def _read_members(row: Mapping[str, Any], where: str) -> Members:
    members = row.get("members")
    if not isinstance(members, list) or not all(isinstance(name, str) for name in members):
        raise ValueError(f'{where}: members {members!r}. Expected a list of names: ["a", "b"].')
    if not members or len(set(members)) < len(members):
        raise ValueError(f"{where}: members {members!r}. Name at least one, and none twice.")
    return tuple(members)


def _read_items(items: Any, where: str) -> dict[str, list[float]]:
    if items is None:
        return {}
    if not isinstance(items, dict) or not all(isinstance(v, list) for v in items.values()):
        raise ValueError(f'{where}: items. Expected {{"task": [score of each item, ...], ...}}.')
    for task, values in items.items():
        if not values:
            raise ValueError(f'{where}: task "{task}" has no items.')
        wrong = next((i for i, value in enumerate(values) if not _is_number(value)), None)
        if wrong is not None:
            raise ValueError(
                f'{where}: item {wrong} of task "{task}", {values[wrong]!r}, is not a number.'
            )
    return items


def _read_cost(cost: Any, where: str) -> Cost:
    if cost is None:
        return UNKNOWN
    known = [each.name for each in fields(Cost)]
    if not isinstance(cost, dict):
        raise ValueError(f"{where}: cost {cost!r}. Expected an object with {', '.join(known)}.")
    for name, value in cost.items():
        if name not in known:
            raise ValueError(f'{where}: cost "{name}". Known: {", ".join(known)}.')
        if value is not None and not (_is_number(value) and value > 0):
            raise ValueError(f"{where}: cost {name} {value!r} is not a number above zero.")
    return Cost(**cost)


def _check_comparable(rows: Sequence[Row]) -> None:
    """The same tasks with the same numbers of items in every row."""
    first = rows[0] if rows else None
    for row in rows[1:]:
        assert first is not None
        for task in dict.fromkeys([*first.result.items, *row.result.items]):
            here, there = (len(each.result.items.get(task, ())) for each in (row, first))
            if here != there:
                raise ValueError(
                    f'{row.where} has {here} items of task "{task}", {first.where} has {there}. '
                    "Give all mixtures the same items, or scores without items."
                )


def _differ(one: Result, other: Result) -> bool:
    if one.error or other.error:
        return one.error != other.error
    same = math.isclose(score_of(one), score_of(other), rel_tol=1e-9, abs_tol=1e-12)
    return not same or one.items != other.items


def _agrees(printed: float, exact: float) -> bool:
    """Within half a unit of the last digit that the printed score has."""
    digits = Decimal(repr(printed)).as_tuple().exponent
    assert isinstance(digits, int)
    return math.isclose(printed, exact, rel_tol=1e-6, abs_tol=0.5 * 10.0**digits)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
