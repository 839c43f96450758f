"""The mixtures that a search has scored: by what names and in what numbers they are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from train.search.rounds import Candidate, Choice, Interval, Round
from train.search.rules import named
from train.search.trial import Cost, Members

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
"""In a cell that has nothing to show."""


def short_title(members: Members, base: Members) -> str:
    """A mixture by what it has beside the base: `+sam`; the base itself by its whole name."""
    if not base or not set(base) < set(members):
        return named(members)
    return f"+{named(tuple(name for name in members if name not in base))}"


def change_title(members: Members, incumbent: Candidate | None) -> str:
    """A mixture by what it has more, or less, than the one it is compared with: `+sam`."""
    before = incumbent.members if incumbent is not None else ()
    if before and set(members) < set(before):
        return "".join(f"{MINUS}{name}" for name in before if name not in members)
    return short_title(members, before)


@dataclass(frozen=True)
class Scale:
    """How scores are shown: shares as per cent, anything else as it is."""

    factor: float
    unit: str

    @classmethod
    def of(cls, choice: Choice) -> Scale:
        scores = [each.score.mean for each in all_candidates(choice) if each.score is not None]
        shares = all(0 <= score <= 1 for score in scores)
        return cls(100, " %") if shares else cls(1, "")

    def heading(self, what: str) -> str:
        """`score, in %`."""
        return f"{what}, in{self.unit}" if self.unit else what

    def score(self, value: float | None) -> str:
        """`42.3`."""
        return NONE if value is None else f"{self.factor * value:.1f}".replace("-", MINUS)

    def gain(self, value: float | None) -> str:
        """`+1.2`."""
        return NONE if value is None else f"{self.factor * value:+.1f}".replace("-", MINUS)

    def ends(self, interval: Interval | None, show: Callable[[float | None], str]) -> str:
        """`41.0 to 43.5`."""
        if interval is None or interval.low is None or interval.high is None:
            return NONE
        return f"{show(interval.low)} to {show(interval.high)}"

    def whole(self, interval: Interval) -> str:
        """`42.3 % (41.0 to 43.5)`."""
        mean = f"{self.score(interval.mean)}{self.unit}"
        ends = self.ends(interval, self.score)
        return mean if ends == NONE else f"{mean} ({ends})"


def all_candidates(choice: Choice) -> list[Candidate]:
    """Every mixture of every round, as often as it occurs, incumbents before their candidates."""
    return [
        candidate
        for each in choice.rounds
        for candidate in (each.incumbent, *each.candidates)
        if candidate is not None
    ]


def is_look_back(choice: Choice, decided: Round) -> bool:
    """Whether a round tried nothing, but chose among the mixtures that earlier rounds stood at."""
    before = choice.rounds[: choice.rounds.index(decided)]
    stood = {each.incumbent.members for each in before if each.incumbent is not None}
    return bool(stood) and all(each.members in stood for each in decided.candidates)


def scored_mixtures(choice: Choice) -> list[Candidate]:
    """Every mixture with a full score, once: as it was known with the most seeds."""
    known: dict[Members, Candidate] = {}
    for candidate in all_candidates(choice):
        before = known.get(candidate.members)
        more = before is None or len(candidate.seeds) >= len(before.seeds)
        if candidate.score is not None and more:
            known[candidate.members] = candidate
    return list(known.values())


def ranked_mixtures(choice: Choice) -> list[Candidate]:
    """The same, from the highest score to the lowest."""
    return sorted(scored_mixtures(choice), key=lambda each: -each.score.mean if each.score else 0.0)


def pareto_front(
    mixtures: Sequence[Candidate], cost: Callable[[Cost], float | None], less: bool = True
) -> list[Candidate]:
    """Mixtures than which no other scores as high at as good a cost, one of them better.

    By rising cost, or falling if more is better (`less=False`). Those without cost are left out.
    """
    sign = 1 if less else -1
    points = [
        (sign * value, -each.score.mean, each)
        for each in mixtures
        if each.score is not None and (value := cost(each.cost)) is not None
    ]
    return [
        each
        for price, loss, each in sorted(points, key=lambda point: point[:2])
        if not any(
            other[0] <= price and other[1] <= loss and other[:2] != (price, loss)
            for other in points
        )
    ]
