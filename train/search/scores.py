"""What trials say of mixtures: scores, and how much of a difference could be noise.

Noise is of two kinds. **Items**: another draw of test questions would give other scores;
all mixtures answered the same questions, which are therefore resampled for all of them together
(paired bootstrap, Efron 1979, per task). **Seeds**: another training run would give another score;
two or three runs say little about that, so that the spread between the runs of a mixture is pooled
over all mixtures that have several, and its own uncertainty is drawn as well. What is not known is
taken to be none, and `Evidence.noise_of` says what is known.

`eagle_moe.scores.score` has a bootstrap of one difference. Here many mixtures are drawn jointly,
tasks count equally, and nothing may import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from train.search.rounds import Interval, Verdict
from train.search.trial import UNKNOWN, Cost, Members, Result

Floats = NDArray[np.float64]

RESAMPLES = 10_000
SEED = 0
"""Of the resampling: the same results always lead to the same decision."""
TAILS = (0.025, 0.975)
BATCH = 50_000
"""Draws at once: few enough to stay in the cache of a core, which is twice as fast."""


def score_of(result: Result) -> float:
    """Mean over tasks of the mean over items; the given score where no items are known."""
    if result.items:
        return float(np.mean([np.mean(values) for values in result.items.values()]))
    assert result.score is not None
    return result.score


def above(first: float, second: float) -> bool:
    """Higher by more than the rounding of sums."""
    return first > second and not math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-12)


@dataclass(frozen=True)
class Measured:
    """The trials of one mixture that succeeded, in the order of their seeds; at least one."""

    members: Members
    results: tuple[Result, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(result.trial.seed for result in self.results)

    @cached_property
    def items(self) -> dict[str, Floats]:
        """Task -> (seeds, items)."""
        tasks = self.results[0].items
        return {
            task: np.array([result.items[task] for result in self.results], dtype=np.float64)
            for task in tasks
        }

    def by_seed(self, tasks: Sequence[str]) -> Floats:
        """Score of every seed (seeds,) over `tasks`; over everything where no items are known."""
        if not self.items:
            return np.array([score_of(result) for result in self.results])
        return np.mean([self.items[task].mean(axis=1) for task in tasks], axis=0)

    @property
    def cost(self) -> Cost:
        return next((one.cost for one in self.results if one.cost != UNKNOWN), UNKNOWN)


class Evidence:
    """Scores of mixtures and their joint noise, over all tasks or, by `without`, all but one."""

    def __init__(
        self,
        measured: Mapping[Members, Measured],
        resamples: int = RESAMPLES,
        tasks: Sequence[str] | None = None,
    ) -> None:
        """`tasks`: those that count; default: all that items are known of."""
        self.measured = dict(measured)
        self.resamples = resamples
        mixtures = list(self.measured.values())
        known = list(mixtures[0].items) if mixtures else []
        self.tasks = tuple(known if tasks is None else tasks)
        self._column = {members: column for column, members in enumerate(self.measured)}
        self._scores = {one.members: float(one.by_seed(self.tasks).mean()) for one in mixtures}

    def without(self, task: str) -> Evidence:
        """The same trials as if `task` had not been asked."""
        kept = [name for name in self.tasks if name != task]
        return Evidence(self.measured, self.resamples, kept)

    def score(self, members: Members) -> float:
        return self._scores[members]

    @property
    def noise_of(self) -> tuple[str, ...]:
        """What is known of noise: of "items" (at least two in every task), of "seeds"."""
        mixtures = list(self.measured.values())
        counts = [mixtures[0].items[task].shape[1] for task in self.tasks]
        items = ("items",) if counts and min(counts) > 1 else ()
        return (*items, "seeds") if any(len(one.seeds) > 1 for one in mixtures) else items

    @cached_property
    def noise(self) -> Floats | None:
        """(resamples, mixtures): by how much each score could be off; None if nothing is known."""
        if not self.noise_of or not self.resamples:
            return None
        noise = np.zeros((self.resamples, len(self.measured)))
        if "items" in self.noise_of:
            for stream, task in enumerate(self.tasks, start=1):
                noise += _resample(self._by_item(task), self.resamples, stream) / len(self.tasks)
        if "seeds" in self.noise_of:
            noise += self._seed_noise()
        return noise

    def interval(self, members: Members) -> Interval:
        """Its score with its 95 % interval, which stays within 0 to 1 where all items do."""
        if self.noise is None:
            return Interval(self.score(members))
        noise = self.noise[:, self._column[members]]
        if self._shares:
            return _interval(self.score(members), noise, (0.0, 1.0))
        return _interval(self.score(members), noise)

    @cached_property
    def _shares(self) -> bool:
        """Whether scores are means of items between 0 and 1, such as shares of right answers."""
        values = [one.items[task] for one in self.measured.values() for task in self.tasks]
        return bool(values) and all(((each >= 0) & (each <= 1)).all() for each in values)

    def gain(self, members: Members, other: Members) -> Interval:
        """Its score minus that of `other`, paired, with its 95 % interval."""
        difference = self.score(members) - self.score(other)
        if self.noise is None:
            return Interval(difference)
        first, second = self._column[members], self._column[other]
        return _interval(difference, self.noise[:, first] - self.noise[:, second])

    @cached_property
    def covariance(self) -> Floats:
        """(mixtures, mixtures): of the noise, by formula; zero where nothing is known."""
        mixtures = list(self.measured.values())
        total = np.zeros((len(mixtures), len(mixtures)))
        if "items" in self.noise_of:
            for task in self.tasks:
                values = self._by_item(task)
                total += np.cov(values).reshape(total.shape) / values.shape[1]
            total /= len(self.tasks) ** 2
        if "seeds" in self.noise_of:
            spread, flips, _ = self._runs()
            runs = np.array([len(one.seeds) for one in mixtures])
            total += np.diag(max(spread - flips, 0.0) / runs)
        return total

    def _by_item(self, task: str) -> Floats:
        """(mixtures, items): means over seeds."""
        return np.stack([one.items[task].mean(axis=0) for one in self.measured.values()])

    def _runs(self) -> tuple[float, float, int]:
        """Variance of a run's score, how much of it items show already, and degrees of freedom.

        A run that gets other items right is noise that the resampling of items holds as well; only
        what moves the whole score comes on top: a two-way analysis of variance.
        """
        repeated = [one for one in self.measured.values() if len(one.seeds) > 1]
        freedom = sum(len(one.seeds) - 1 for one in repeated)
        spread = sum(_squares(one.by_seed(self.tasks)) for one in repeated) / freedom
        if "items" not in self.noise_of:
            return spread, 0.0, freedom
        flips = sum(_flips(one, self.tasks) * (len(one.seeds) - 1) for one in repeated) / freedom
        return spread, flips, freedom

    def _seed_noise(self) -> Floats:
        """(resamples, mixtures): what other training runs would change, beyond what items show."""
        spread, flips, freedom = self._runs()
        rng = np.random.default_rng((SEED, 0))
        variance = spread * freedom / rng.chisquare(freedom, size=(self.resamples, 1)) - flips
        runs = np.array([len(one.seeds) for one in self.measured.values()])
        draws = rng.standard_normal((self.resamples, len(runs)))
        return np.asarray(draws * np.sqrt(np.maximum(variance, 0) / runs))


def verdict_of(gain: Interval) -> Verdict | None:
    """Of a gain with its 95 % interval; None where it has none."""
    if gain.low is None or gain.high is None:
        return None
    return "better" if gain.low > 0 else "worse" if gain.high < 0 else "not distinguishable"


def _interval(
    mean: float, noise: Floats, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    low, high = np.clip(mean + np.quantile(noise, TAILS), *bounds).tolist()
    return Interval(mean, min(low, mean), max(high, mean))


def _resample(values: Floats, resamples: int, stream: int) -> Floats:
    """(mixtures, items) -> (resamples, mixtures): means of resampled items minus the means."""
    count = values.shape[1]
    centred = np.ascontiguousarray((values - values.mean(axis=1, keepdims=True)).T)
    rng = np.random.default_rng((SEED, stream))
    noise = np.empty((resamples, len(values)))
    rows = max(1, BATCH // count)
    for start in range(0, resamples, rows):
        here = min(rows, resamples - start)
        draws = rng.integers(count, size=(here, count))
        draws += count * np.arange(here)[:, None]
        weights = np.bincount(draws.ravel(), minlength=here * count).reshape(here, count)
        noise[start : start + here] = weights.astype(np.float64) @ centred / count
    return noise


def _squares(values: Floats) -> float:
    return float(((values - values.mean()) ** 2).sum())


def _flips(measured: Measured, tasks: Sequence[str]) -> float:
    """Variance of a run's score from the items that this run, unlike others, got right or wrong.

    Its items' residuals from the additive model of runs and items, averaged like scores are.
    """
    total = 0.0
    for task in tasks:
        values = measured.items[task]
        runs, count = values.shape
        rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
        total += float((rest**2).sum()) / ((runs - 1) * (count - 1)) / count
    return total / len(tasks) ** 2
