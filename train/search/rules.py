"""Rules that decide: the highest score, or the cheapest of what luck alone cannot put behind.

A rule picks in every round, and when the rounds are over it may go back to an earlier mixture.
Both are told with the numbers that led there. docs/search-rules.md says why the noise-aware rule
is made like this, and what it gains in searches whose truth is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from train.search.scores import Evidence, above, verdict_of
from train.search.trial import Members


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
    """Of the mixtures that stand, the cheapest. A mixture stands unless a rival is ahead by more
    than luck: by more than the luckiest of its rivals would seem to be ahead, in `level` of the
    cases, if all were equally good (multiple comparisons with the best, Hsu 1984).

    In a round, the candidates are each other's rivals, and one that is dearer than the incumbent
    must be above it. At the end the rule looks back at all mixtures that the search stood at.

    - `first_seeds`: seeds of the search that every mixture is trained with; the others go one at a
      time to those between which a round is in doubt.

    Cheapest: by parameters, else by FLOPs, if they are known of all; else by the number of
    experts. Of equals the higher score.
    """

    level: float = 0.6
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
        if evidence.noise is None:
            standing = ranked
        else:
            standing = [one for one in ranked if self._stands(evidence, one, known)]
            if "seeds" not in evidence.noise_of:
                standing = list(dict.fromkeys([*ranked[:2], *standing]))
        return standing if len(standing) > 1 else []

    def pick(self, evidence: Evidence, incumbent: Members, tried: Sequence[Members]) -> Pick:
        """`incumbent` is () where there is none.

        Raises `ValueError` if nothing is known of the noise in the scores.
        """
        if evidence.noise is None:
            raise ValueError(
                "rule noise_aware: nothing is known of the noise in these scores. Give at least "
                "two scores per task (items), or scores of several seeds, or decide by rule plain."
            )
        going = [one for one in tried if self._may_follow(evidence, incumbent, one)]
        standing = [one for one in going if self._stands(evidence, one, tried)]
        if not standing:
            return _stop(evidence, incumbent, tried)
        chosen, by = cheapest(evidence, standing)
        if chosen == _best(evidence, tried):
            return Pick(chosen, _highest(evidence, incumbent, tried))
        gain = f" It is {_gain(evidence, chosen, incumbent)}." if incumbent else ""
        return Pick(
            chosen,
            f"{named(chosen)} ({show(evidence.score(chosen))}) has {by} of the {len(standing)} "
            f"candidates that stand: {self._ahead(evidence, chosen, tried)}{gain}",
        )

    def look_back(self, evidence: Evidence, steps: Sequence[Step]) -> Pick | None:
        """The cheapest of the mixtures that the search stood at and that stand.

        Every step is the best of several, with luck in it. Judged together with those after it, a
        small but real one is told from luck more easily than alone. None: there is one only.
        """
        if len(steps) < 2:
            return None
        rivals = _rivals(steps)
        standing = [one for one in rivals if self._stands(evidence, one, rivals[one])]
        last, before = steps[-1].members, steps[-2].members
        chosen, by = cheapest(evidence, standing or [last])
        if chosen == last:
            why = f"It has {by} of the mixtures that stand."
            if before not in standing:
                why = f"Of {named(before)}, {self._ahead(evidence, before, rivals[before])}"
            return Pick(last, f"Looking back, {named(last)} stays. {why}")
        ahead = self._ahead(evidence, chosen, rivals[chosen])
        return Pick(
            chosen,
            f"Looking back, {named(chosen)} ({show(evidence.score(chosen))}) has {by} of the "
            f"mixtures that stand: {ahead}",
        )

    def _may_follow(self, evidence: Evidence, incumbent: Members, one: Members) -> bool:
        if not incumbent or above(evidence.score(one), evidence.score(incumbent)):
            return True
        cheaper, _ = cheapest(evidence, [incumbent, one])
        return cheaper == one and self._stands(evidence, one, [incumbent])

    def _stands(self, evidence: Evidence, one: Members, rivals: Sequence[Members]) -> bool:
        others = [other for other in rivals if other != one]
        if not others:
            return True
        lead = evidence.score(_best(evidence, others)) - evidence.score(one)
        return not above(lead, max(evidence.luck(one, others, self.level), 0.0))

    def _ahead(self, evidence: Evidence, one: Members, rivals: Sequence[Members]) -> str:
        others = [other for other in rivals if other != one]
        best = _best(evidence, others)
        lead = evidence.score(best) - evidence.score(one)
        luck = evidence.luck(one, others, self.level)
        return (
            f"{named(best)} is ahead by {show(lead)}, {'more' if lead > luck else 'no more'} than "
            f"the {show(luck)} by which the luckiest of {len(others)} would seem ahead in "
            f"{1 - self.level:.0%} of cases if all were equally good."
        )


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


def _rivals(steps: Sequence[Step]) -> Mapping[Members, Sequence[Members]]:
    """With whom each mixture on the way is compared: those before it there, and all tried since."""
    return {
        step.members: [
            *(before.members for before in steps[:number]),
            *dict.fromkeys(one for since in steps[number:] for one in since.tried),
        ]
        for number, step in enumerate(steps)
    }


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
