"""Rules that decide: the highest score, or the cheapest of those to which none is truly preferable.

A rule picks in every round, and when the rounds are over it may go back to an earlier mixture.
Both are told with the numbers that led there. docs/search-rules.md says why the noise-aware rule
is made like this, and what it gains in searches whose truth is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from train.search.expected import Expected
from train.search.scores import Evidence, above, verdict_of
from train.search.trial import Members

DOUBT = 0.6
"""A mixture is out of the question for more seeds once another is better with more probability."""


@dataclass(frozen=True)
class Pick:
    """`chosen` is None if the round stops the search. `reason`: a sentence or two, with numbers."""

    chosen: Members | None
    reason: str


@dataclass(frozen=True)
class Step:
    """A mixture that the search stood at, and what it tried from there and could score."""

    members: Members
    tried: tuple[Members, ...]


@dataclass(frozen=True)
class Plain:
    """The paper's rule: the highest score, and stop when it is not above the incumbent's.

    Every mixture is trained with every seed of the search.
    """

    name: ClassVar[str] = "plain"

    def first(self, seeds: Sequence[int]) -> Sequence[int]:
        return seeds

    def doubtful(
        self, evidence: Evidence, incumbent: Members, tried: Sequence[Members]
    ) -> list[Members]:
        """Nobody needs more seeds."""
        return []

    def pick(self, evidence: Evidence, incumbent: Members, tried: Sequence[Members]) -> Pick:
        """`incumbent` is () where there is none, and then the search goes on in any case."""
        best = _best(evidence, tried)
        if incumbent and not above(evidence.score(best), evidence.score(incumbent)):
            return _stop(evidence, incumbent, tried)
        return Pick(best, _highest(evidence, incumbent, tried))

    def look_back(self, evidence: Evidence, steps: Sequence[Step]) -> Pick | None:
        """It never goes back."""
        return None


@dataclass(frozen=True)
class NoiseAware:
    """Of the mixtures that stand, the cheapest. A mixture stands unless another is truly better
    with a probability above `level`, given all that was measured (`train.search.expected`).

    In a round the candidates are judged so, and one that is dearer than the incumbent must be above
    it as well. At the end the mixtures that the search stood at are.

    - `first_seeds`: seeds of the search that every mixture is trained with; the others go one at a
      time to those between which a round is in doubt.

    Cheapest: by parameters, else by FLOPs, if they are known of all; else by the number of
    experts. Of equals the higher score.
    """

    level: float = 0.7
    first_seeds: int = 1
    name: ClassVar[str] = "noise_aware"

    def __post_init__(self) -> None:
        if not 0.5 <= self.level < 1:
            raise ValueError(f"rule.level: {self.level}. Give a share from 0.5 to below 1.")
        if self.first_seeds < 1:
            raise ValueError(f"rule.first_seeds: {self.first_seeds}. Give 1 or more.")

    def first(self, seeds: Sequence[int]) -> Sequence[int]:
        return seeds[: self.first_seeds]

    def doubtful(
        self, evidence: Evidence, incumbent: Members, tried: Sequence[Members]
    ) -> list[Members]:
        """Those that might be the best, if there are several: they should have another seed.

        Until a mixture has had two, nobody knows what another run would change: the two best are
        then in doubt in any case.
        """
        known = [*([incumbent] if incumbent else []), *tried]
        ranked = sorted(known, key=evidence.score, reverse=True)
        if not evidence.noise_of:
            doubtful = ranked
        else:
            doubtful = _standing(Expected(evidence), ranked, DOUBT)
            if "seeds" not in evidence.noise_of:
                doubtful = list(dict.fromkeys([*ranked[:2], *doubtful]))
        return doubtful if len(doubtful) > 1 else []

    def pick(self, evidence: Evidence, incumbent: Members, tried: Sequence[Members]) -> Pick:
        """`incumbent` is () where there is none.

        Raises `ValueError` if nothing is known of the noise in the scores.
        """
        if not evidence.noise_of:
            raise ValueError(
                "rule noise_aware: nothing is known of the noise in these scores. Give at least "
                "two scores per task (items), or scores of several seeds, or decide by rule plain."
            )
        expected = Expected(evidence)
        standing = [
            one
            for one in _standing(expected, tried, self.level)
            if self._may_follow(evidence, expected, incumbent, one)
        ]
        if not standing:
            return _stop(evidence, incumbent, tried)
        chosen, by = cheapest(evidence, standing)
        if chosen == _best(evidence, tried):
            return Pick(chosen, _highest(evidence, incumbent, tried))
        gain = f" It is {_gain(evidence, chosen, incumbent)}." if incumbent else ""
        return Pick(
            chosen,
            f"{named(chosen)} ({show(evidence.score(chosen))}) has {by} of the {len(standing)} "
            f"candidates that stand. {_judged(evidence, expected, chosen, tried)}{gain}",
        )

    def look_back(self, evidence: Evidence, steps: Sequence[Step]) -> Pick | None:
        """The cheapest of the mixtures that the search stood at and that stand.

        Every step was the best of several, with luck in it, and what was tried after it tells more
        of it. None: there is one only.
        """
        if len(steps) < 2:
            return None
        expected = Expected(evidence)
        way = [step.members for step in steps]
        standing = _standing(expected, way, self.level)
        chosen, by = cheapest(evidence, standing)
        last, before = way[-1], way[-2]
        if chosen != last:
            return Pick(
                chosen,
                f"Looking back, {named(chosen)} ({show(evidence.score(chosen))}) has {by} of the "
                f"mixtures that stand. {_judged(evidence, expected, chosen, way)}",
            )
        why = f"It has {by} of the mixtures that stand."
        if before not in standing:
            why = _judged(evidence, expected, before, way)
        return Pick(last, f"Looking back, {named(last)} stays. {why}")

    def _may_follow(
        self, evidence: Evidence, expected: Expected, incumbent: Members, one: Members
    ) -> bool:
        if not incumbent or above(evidence.score(one), evidence.score(incumbent)):
            return True
        cheaper, _ = cheapest(evidence, [incumbent, one])
        return cheaper == one and expected.better(incumbent, one) <= self.level


Rule = Plain | NoiseAware
RULES: dict[str, type[Rule]] = {"plain": Plain, "noise_aware": NoiseAware}


def cheapest(evidence: Evidence, mixtures: Sequence[Members]) -> tuple[Members, str]:
    """The cheapest, of equals the one with the higher score; and by what, in words."""
    costs = [evidence.measured[one].cost for one in mixtures]
    by, prices = "the fewest experts", [float(len(one)) for one in mixtures]
    for name, values in (
        ("FLOPs", [cost.flops for cost in costs]),
        ("parameters", [cost.parameters for cost in costs]),
    ):
        if all(value is not None for value in values):
            by, prices = f"the fewest {name}", [value or 0.0 for value in values]
    price = dict(zip(mixtures, prices, strict=True))
    return min(mixtures, key=lambda one: (price[one], -evidence.score(one))), by


def named(members: Members) -> str:
    """A mixture in one word."""
    return "+".join(members)


def show(score: float) -> str:
    """A score or a difference of scores, whatever their scale."""
    return f"{score:.4g}"


def _standing(expected: Expected, mixtures: Sequence[Members], level: float) -> list[Members]:
    """Those to which none is preferable: the one of which most is expected is among them."""
    best = max(mixtures, key=expected.score)
    return [one for one in mixtures if one == best or expected.better(best, one) <= level]


def _judged(
    evidence: Evidence, expected: Expected, one: Members, mixtures: Sequence[Members]
) -> str:
    """What is to be said of its strongest rival."""
    rival = max((other for other in mixtures if other != one), key=expected.score)
    lead = evidence.score(rival) - evidence.score(one)
    left = expected.score(rival) - expected.score(one)
    sure = min(max(expected.better(rival, one), 0.01), 0.99)
    return (
        f"{named(rival)} scored {show(abs(lead))} {'more' if lead >= 0 else 'less'} than "
        f"{named(one)}; by all that was measured, {left:+.4g} is to be expected, and it is truly "
        f"better with a probability of {sure:.0%}."
    )


def _best(evidence: Evidence, mixtures: Sequence[Members]) -> Members:
    return max(mixtures, key=evidence.score)


def _highest(evidence: Evidence, incumbent: Members, tried: Sequence[Members]) -> str:
    best = _best(evidence, tried)
    text = f"{named(best)} has the highest score of {len(tried)}, {show(evidence.score(best))}"
    return f"{text}: {_gain(evidence, best, incumbent)}." if incumbent else f"{text}."


def _stop(evidence: Evidence, incumbent: Members, tried: Sequence[Members]) -> Pick:
    best = _best(evidence, tried)
    score = show(evidence.score(best))
    return Pick(
        None,
        f"Stop: the highest score of {len(tried)}, {score} of {named(best)}, is "
        f"{_gain(evidence, best, incumbent)}.",
    )


def _gain(evidence: Evidence, one: Members, incumbent: Members) -> str:
    gain = evidence.gain(one, incumbent)
    side = "above" if gain.mean >= 0 else "below"
    text = f"{show(abs(gain.mean))} {side} {named(incumbent)} ({show(evidence.score(incumbent))})"
    if gain.low is None or gain.high is None:
        return text
    return f"{text}; 95 % {gain.low:+.3g} to {gain.high:+.3g}, {verdict_of(gain)}"
