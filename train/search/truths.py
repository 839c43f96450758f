"""Made-up pools of experts whose true scores are known: what searches are judged on.

A question is answered rightly if a sum of normal parts is above zero: how easy the question is (the
same for every mixture), what the experts of the mixture make of it, what this training run makes of
it, and how good the mixture truly is on the task. So mixtures find the same questions hard, and two
runs of one mixture differ in single answers and as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from train.search.pool import Pool
from train.search.trial import Members, Result, Trial

Floats = NDArray[np.float64]
Gains = Callable[[np.random.Generator, int], "Truth"]

BASE = "base"
EASE, TASTE, FLIPS = 1.0, 0.2, 0.2
"""Variances: of questions, of what experts make of them, of what a run makes of them. A mixture
and the next, or two runs, then disagree about a fifth of the questions."""
POINT = 0.01
NORMAL = NormalDist()


@dataclass(frozen=True)
class Truth:
    """`adds`: what every expert adds to the score, in points of 100, when it works alone.

    - `fade`: the second best of the experts in a mixture adds that share less, and so on.
    - `doubles`: expert -> one that can all it can: beside that it adds nothing.
    """

    adds: tuple[float, ...]
    fade: float = 0.0
    doubles: Mapping[int, int] = field(default_factory=dict)

    def parts(self, chosen: Sequence[int]) -> dict[int, float]:
        """What each of the chosen experts adds among the others, in points."""
        own = [e for e in chosen if self.doubles.get(e) not in chosen]
        ranked = sorted(own, key=lambda e: -self.adds[e])
        return {
            e: self.adds[e] * ((1 - self.fade) ** place if self.adds[e] > 0 else 1)
            for place, e in enumerate(ranked)
        }


def useless(rng: np.random.Generator, experts: int) -> Truth:
    """Nothing helps, nothing harms."""
    return Truth((0.0,) * experts)


def harmful(rng: np.random.Generator, experts: int) -> Truth:
    """Everything harms a little."""
    return Truth(tuple(-rng.uniform(0.1, 1.0, experts)))


def few(rng: np.random.Generator, experts: int) -> Truth:
    """One to three help, the others do nothing or harm a little."""
    adds = np.where(rng.random(experts) < 0.5, 0.0, -rng.uniform(0, 0.6, experts))
    good = rng.integers(1, 4)
    adds[:good] = rng.uniform(0.7, 3.0, good)
    return Truth(tuple(rng.permutation(adds)), rng.uniform(0, 0.3))


def small(rng: np.random.Generator, experts: int) -> Truth:
    """Everything helps a little."""
    return Truth(tuple(rng.uniform(0.3, 1.0, experts)), rng.uniform(0, 0.3))


def redundant(rng: np.random.Generator, experts: int) -> Truth:
    """All help, but two of them can only what two others can."""
    adds = rng.uniform(0.5, 2.5, experts)
    order = [int(e) for e in np.argsort(adds)]
    doubles = {order[0]: order[-1], order[1]: order[-2]}
    return Truth(tuple(adds), rng.uniform(0, 0.3), doubles)


def spread(rng: np.random.Generator, experts: int) -> Truth:
    """Half help and half harm, by anything around zero."""
    return Truth(tuple(rng.normal(0, 0.8, experts)))


def mixed(rng: np.random.Generator, experts: int) -> Truth:
    """Some of everything."""
    kinds = rng.choice(["useless", "harmful", "small", "good", "double"], experts)
    ranges = {"useless": (0, 0), "harmful": (-0.8, -0.1), "small": (0.3, 1.0)}
    adds = [float(rng.uniform(*ranges.get(kind, (0.8, 3.0)))) for kind in kinds]
    best = int(np.argmax(adds))
    doubles = {e: best for e in range(experts) if kinds[e] == "double" and e != best}
    return Truth(tuple(adds), rng.uniform(0, 0.3), doubles)


FAMILIES: dict[str, Gains] = {
    each.__name__: each for each in (useless, harmful, few, redundant, mixed, small, spread)
}


class World:
    """A pool, its truth and its questions; runs trials.

    - `tasks` with `items` questions each.
    - `run_noise`: points by which a training run is better or worse as a whole (one sigma).
    """

    def __init__(self, truth: Truth, seed: int, tasks: int, items: int, run_noise: float) -> None:
        rng = np.random.default_rng(seed)
        self.truth, self.seed, self.items = truth, seed, items
        self.names = tuple(f"e{number}" for number in range(len(truth.adds)))
        self.pool = Pool((BASE, *self.names), (BASE,))
        self.tasks = [f"task{number}" for number in range(tasks)]
        self.start = rng.uniform(0.35, 0.65, tasks)
        self.weights = rng.dirichlet(np.full(tasks, 3.0), len(self.names)) * tasks
        self.ease = np.sqrt(EASE) * rng.standard_normal((tasks, items))
        self.taste = np.sqrt(TASTE) * rng.standard_normal((1 + len(self.names), tasks, items))
        self.run_noise = run_noise * POINT / NORMAL.pdf(0) * np.sqrt(EASE + TASTE + FLIPS)
        """On the scale of the sum: a point near the middle is so much of a standard deviation."""

    def __call__(self, trials: Sequence[Trial]) -> list[Result]:
        return [self._run(trial) for trial in trials]

    def true_score(self, members: Members) -> float:
        """Expected score, over questions and runs."""
        return float(self._by_task(members).mean())

    def best(self) -> list[Members]:
        """The mixtures with the highest true score; of equals, those with the fewest experts."""
        every = [
            self.pool.members((BASE, *more))
            for size in range(len(self.names) + 1)
            for more in combinations(self.names, size)
        ]
        scores = {members: round(self.true_score(members), 12) for members in every}
        highest = [members for members in every if scores[members] == max(scores.values())]
        fewest = min(map(len, highest))
        return [members for members in highest if len(members) == fewest]

    def helps(self, members: Members) -> bool:
        """Whether any further expert would truly raise the score."""
        score = self.true_score(members)
        more = [self.pool.members((*members, name)) for name in self.pool.outside(members)]
        return any(self.true_score(one) > score + 1e-12 for one in more)

    def _by_task(self, members: Members) -> Floats:
        chosen = [number for number, name in enumerate(self.names) if name in members]
        parts = self.truth.parts(chosen)
        return self.start + POINT * sum(
            (part * self.weights[e] for e, part in parts.items()), np.zeros(len(self.tasks))
        )

    def _run(self, trial: Trial) -> Result:
        numbers = [self.pool.names.index(name) for name in trial.members]
        rng = np.random.default_rng((self.seed, trial.seed, *numbers))
        taste = self.taste[numbers].sum(axis=0) / np.sqrt(len(numbers))
        flips = np.sqrt(FLIPS) * rng.standard_normal(taste.shape)
        luck = self.run_noise * rng.standard_normal()
        sigma = np.sqrt(EASE + TASTE + FLIPS + self.run_noise**2)
        levels = np.array([NORMAL.inv_cdf(float(score)) for score in self._by_task(trial.members)])
        right = sigma * levels[:, None] + self.ease + taste + flips + luck > 0
        answers = right.astype(np.float64)
        return Result(trial, items=dict(zip(self.tasks, answers, strict=True)))
