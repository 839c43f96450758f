"""Whether two scores differ, and why they could: `python -m eval.compare A B`.

A and B are score folders: `OUT/<task>`, its `card.json`, or `OUT` itself, and then every task that
both hold is compared. Ends with 0 if they could be compared, whatever came out, and with 2 if not.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eagle_moe.scores.answer import Answer, read_answers
from eagle_moe.scores.card import CARD, Card, Score
from eagle_moe.scores.score import TOTAL, paired_difference

LONGEST = 60
"""Characters of a field that are shown."""


@dataclass(frozen=True)
class Field:
    """A field of the identity that two scores do not share, such as `recipe.stages.sft.lr`."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Difference:
    """`first` minus `second` of a metric's part, with the 95 % interval of the difference.

    - `paired`: whether it is from the items, each with both of its scores. If not, the metric is no
      mean of items, and the interval is from both scores' own: wider than it need be.
    - `low`, `high`: None where one of the scores has no interval.
    """

    metric: str
    part: str
    first: float
    second: float
    low: float | None
    high: float | None
    paired: bool

    @property
    def differ(self) -> bool | None:
        """Whether zero is outside the interval; None if there is no interval."""
        if self.low is None or self.high is None:
            return None
        return not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """Of two scores over the same `n` items.

    - `one_sided`: metrics of which only one of the two has a number.
    - `changed`: how many answers are not the same text.
    """

    task: str
    fields: list[Field]
    differences: list[Difference]
    one_sided: list[str]
    n: int
    changed: int


def compare(first: str | Path, second: str | Path) -> list[Comparison]:
    """Compare two score folders, or every task that is in both of two folders of such.

    Raises `FileNotFoundError` for a folder without a card, and `ValueError` for scores of different
    tasks or over different items, for cards that do not follow from their items, and if the two
    folders share no task.
    """
    one, other = _folders(Path(first)), _folders(Path(second))
    if len(one) == len(other) == 1:
        return [_compare(*one.values(), *other.values())]
    shared = [task for task in one if task in other]
    if not shared:
        raise ValueError(
            f"{first} and {second} have no task in common: {', '.join(one)} and {', '.join(other)}."
        )
    return [_compare(one[task], other[task]) for task in shared]


def _folders(path: Path) -> dict[str, Path]:
    """Name -> folder of each score at `path`."""
    folder = path.parent if path.name == CARD else path
    if (folder / CARD).is_file():
        return {folder.name: folder}
    found = {card.parent.name: card.parent for card in sorted(folder.glob(f"*/{CARD}"))}
    if not found:
        raise FileNotFoundError(f"{path}: no {CARD} in it, or one folder below. Give a run's OUT.")
    return found


def _one_sided(first: str | Path, second: str | Path) -> list[str]:
    """Tasks that were left out, as only one of two folders of tasks holds them."""
    one, other = _folders(Path(first)), _folders(Path(second))
    return [] if len(one) == len(other) == 1 else sorted(one.keys() ^ other.keys())


def _compare(first: Path, second: Path) -> Comparison:
    one, other = Card.load(first), Card.load(second)
    mine, theirs = _by_id(first), _by_id(second)
    _check_same(one, other, mine, theirs, f"{first} and {second}")
    return Comparison(
        task=one.task,
        fields=differing(one.identity.dump(), other.identity.dump()),
        differences=list(_differences(one, other, mine, theirs)),
        one_sided=sorted(one.metrics.keys() ^ other.metrics.keys()),
        n=len(mine),
        changed=sum(mine[key].prediction != theirs[key].prediction for key in mine),
    )


def _by_id(folder: Path) -> dict[str, Answer]:
    return {answer.id: answer for answer in read_answers(folder)}


def _check_same(
    one: Card, other: Card, mine: Mapping[str, Answer], theirs: Mapping[str, Answer], where: str
) -> None:
    """Raise `ValueError` unless both answered the same questions of the same task."""
    if one.task != other.task:
        raise ValueError(f"{where}: scores of different tasks, {one.task} and {other.task}.")
    odd = sorted(mine.keys() ^ theirs.keys())
    if odd:
        raise ValueError(
            f"{where}: scores over different items of {one.task}: {len(mine)} and {len(theirs)}, "
            f'of which {len(odd)} are on one side only, such as "{odd[0]}". Evaluate both on the '
            "same data with the same limit."
        )
    changed = [key for key in mine if _asked(mine[key]) != _asked(theirs[key])]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{where}: scores over different items of {one.task}: {len(changed)} have the same id "
            f'but not the same right answer or part, such as "{key}": {_asked(mine[key])} and '
            f"{_asked(theirs[key])}. Evaluate both on the same data."
        )
    if one.identity.task.data_sha256 != other.identity.task.data_sha256:
        raise ValueError(
            f"{where}: scores over different items of {one.task}: ids and answers agree, but "
            "task.data_sha256 does not: images or other columns differ. Evaluate both on the same "
            "data."
        )


def _asked(answer: Answer) -> tuple[Any, str]:
    """What is the data set's alone: the question's wording may be the task's, and some scorers
    write into the fields."""
    return answer.target, answer.part


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Field]:
    """Every leaf of two nested mappings in which they differ, in the order of the first.

    A mapping that only one of them has is one field, not one for each of its leaves.
    """
    fields: list[Field] = []
    for key in dict.fromkeys([*first, *second]):
        one, other = first.get(key), second.get(key)
        if one == other and (key in first) == (key in second):
            continue
        below = _as_mapping(one), _as_mapping(other)
        if below[0] is not None and below[1] is not None and _in_one_order(below[0], below[1]):
            deeper = differing(below[0], below[1])
            fields += [Field(f"{key}.{field.name}", field.first, field.second) for field in deeper]
        else:
            fields.append(Field(str(key), one, other))
    return fields


def _in_one_order(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether what lists share stands in one order in both; of mappings order means nothing."""
    if isinstance(one, _Named) and isinstance(other, _Named):
        return [key for key in one if key in other] == [key for key in other if key in one]
    return True


class _Named(dict[str, Any]):
    """A list of mappings (a recipe's stages) by their names, or by number."""


def _as_mapping(value: Any) -> Mapping[str, Any] | None:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        names = [str(one.get("name", index)) for index, one in enumerate(value)]
        if len(set(names)) == len(names):
            return _Named(zip(names, value, strict=True))
    return None


def _differences(
    one: Card, other: Card, mine: Mapping[str, Answer], theirs: Mapping[str, Answer]
) -> Iterator[Difference]:
    for metric in one.metrics:
        if metric not in other.metrics:
            continue
        if metric in one.means and metric in other.means:
            yield from _paired(metric, one, other, mine, theirs)
        else:
            parts = one.metrics[metric], other.metrics[metric]
            for part in (part for part in parts[0] if part in parts[1]):
                yield _unpaired(metric, part, parts[0][part], parts[1][part])


def _paired(
    metric: str, one: Card, other: Card, mine: Mapping[str, Answer], theirs: Mapping[str, Answer]
) -> Iterator[Difference]:
    values = [
        {key: answer.scores[metric] for key, answer in side.items() if metric in answer.scores}
        for side in (mine, theirs)
    ]
    if any(answer.part for answer in mine.values()):
        parts = {key: answer.part for key, answer in mine.items()}
        found = paired_difference(values[0], values[1], parts)
    else:
        found = paired_difference(values[0], values[1], dict.fromkeys(mine, "all"))
        found = {TOTAL: found[TOTAL]}
    for part, estimate in found.items():
        ends = one.metrics[metric][part].value, other.metrics[metric][part].value
        yield Difference(metric, part, *ends, estimate.low, estimate.high, paired=True)


def _unpaired(metric: str, part: str, one: Score, other: Score) -> Difference:
    """From both intervals, by squaring and adding the sides that matter (Newcombe 1998)."""
    values = metric, part, one.value, other.value
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return Difference(*values, None, None, paired=False)
    difference = one.value - other.value
    low = difference - math.hypot(one.value - one.low, other.high - other.value)
    high = difference + math.hypot(one.high - one.value, other.value - other.low)
    return Difference(*values, low, high, paired=False)


def print_comparison(found: Comparison, console: Console) -> None:
    """First what was not the same, then what came out."""
    console.print(f"{found.task}: {found.n} items, {found.changed} answered differently")
    if found.fields:
        fields = Table("differs", "A", "B")
        for field in found.fields:
            fields.add_row(field.name, _short(field.first), _short(field.second))
        console.print(fields)
    else:
        console.print("Nothing differs in how the two scores were made.")
    for metric in found.one_sided:
        console.print(f"{metric}: only one of the two has a number.")
    if found.differences:
        console.print(_table(found.differences))
    if len(found.differences) > 1:
        console.print("Of rows without any difference, one in twenty says that there is one.")
    if not all(one.paired for one in found.differences):
        console.print(
            "~ is no mean of items: its interval comes from those of A and B, not from pairs of "
            "items, and is wider than it need be."
        )


def _table(differences: Sequence[Difference]) -> Table:
    table = Table("metric")
    for heading in ("A", "B", "A - B", "95 % interval", "they"):
        table.add_column(heading, justify="right")
    several = len({one.part for one in differences}) > 1
    for one in differences:
        name = f"{one.metric}, {one.part}" if several else one.metric
        interval = "" if one.low is None else f"{one.low:+.4g} to {one.high:+.4g}"
        table.add_row(
            f"{name}{'' if one.paired else ' ~'}",
            f"{one.first:.4g}",
            f"{one.second:.4g}",
            f"{one.first - one.second:+.4g}",
            interval,
            {True: "differ", False: "may be equal", None: "not known"}[one.differ],
        )
    return table


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Whether two scores differ, and why they could.")
    parser.add_argument("first", metavar="A", help="OUT/<task> of a run, its card.json, or OUT")
    parser.add_argument("second", metavar="B", help="the same of another run")
    options = parser.parse_args(arguments)
    try:
        comparisons = compare(options.first, options.second)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    console = Console(highlight=False, markup=False)
    odd = _one_sided(options.first, options.second)
    if odd:
        console.print(f"Only in one of the two: {', '.join(odd)}")
    for number, found in enumerate(comparisons):
        if number:
            console.print()
        print_comparison(found, console)


if __name__ == "__main__":
    main()
