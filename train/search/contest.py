"""Searches in made-up pools, and what became of them: right or not, stopped too early or too late.

Right: the chosen mixture has the highest true score; of several, the fewest experts. A search stops
wrongly if it stops where a further expert would truly help (too early), or has gone on from where
none would (too late).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from functools import partial
from itertools import combinations
from typing import TypeVar

import numpy as np

from train.search.expected import Expected
from train.search.rounds import Choice
from train.search.rules import NoiseAware, Plain, Rule
from train.search.scores import Evidence, Floats, Measured
from train.search.strategies import Greedy, search
from train.search.trial import Members, Result, Trial
from train.search.truths import FAMILIES, POINT, World

PLAIN, AWARE = "plain", "noise_aware"
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Way:
    """A rule with the seeds that it may use."""

    rule: Rule
    seeds: tuple[int, ...] = (0,)


FIXED: dict[str, Way] = {PLAIN: Way(Plain())} | {
    f"{AWARE} {level}": Way(NoiseAware(level)) for level in LEVELS
}
"""One run of every mixture: the same table of scores for all."""
BOUGHT: dict[str, Way] = {
    f"{PLAIN}, 2 runs": Way(Plain(), (0, 1)),
    f"{AWARE}, 1 to 4": Way(NoiseAware(), (0, 1, 2, 3)),
}
"""Two runs of every mixture, against one and up to three more where the round is in doubt."""
DEFAULT = f"{AWARE} {NoiseAware.level}"


@dataclass(frozen=True)
class Outcome:
    """Of one search: shares are 0 or 1. `loss`: true points below the best mixture."""

    right: float
    wrong_stop: float
    early: float
    late: float
    loss: float
    experts: float
    trials: float


def make_world(family: str, number: int) -> World:
    """The same for the same arguments."""
    rng = np.random.default_rng((number, list(FAMILIES).index(family)))
    truth = FAMILIES[family](rng, int(rng.integers(4, 7)))
    tasks, items = int(rng.integers(2, 7)), int(200 * 10 ** rng.uniform(0, 1))
    return World(truth, number, tasks, items, float(rng.choice([0.0, 0.3, 0.6])))


class Memory:
    """Runs a world's trials once, however many ask for them. `asked` may be emptied."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.known: dict[Trial, Result] = {}
        self.asked: list[Trial] = []

    def __call__(self, trials: Sequence[Trial]) -> list[Result]:
        self.asked += trials
        new = [trial for trial in trials if trial not in self.known]
        self.known.update(zip(new, self.world(new), strict=True))
        return [self.known[trial] for trial in trials]


def play(world: World, ways: Mapping[str, Way]) -> dict[str, Outcome]:
    """Search by every way; a trial that several ask for has the same result for all."""
    run, best = Memory(world), world.best()
    outcomes = {}
    for name, way in ways.items():
        run.asked.clear()
        choice = search(world.pool, Greedy(), way.rule, run, seeds=way.seeds, resamples=0)
        outcomes[name] = _judge(world, choice, best, len(run.asked))
    return outcomes


def _judge(world: World, choice: Choice, best: Sequence[Members], trials: int) -> Outcome:
    stood = [decided.incumbent.members for decided in choice.rounds if decided.incumbent]
    passed = [members for members in stood if set(members) < set(choice.chosen)]
    early = world.helps(choice.chosen)
    late = any(not world.helps(members) for members in passed)
    loss = (world.true_score(best[0]) - world.true_score(choice.chosen)) / POINT
    return Outcome(
        choice.chosen in best, early or late, early, late, loss, len(choice.chosen) - 1, trials
    )


def experiment(
    worlds: int, ways: Mapping[str, Way], first: int = 0, workers: int = 1
) -> dict[str, dict[str, Floats]]:
    """Family -> way -> (worlds, fields of `Outcome`)."""
    played = _in_all_families(partial(play, ways=ways), worlds, first, workers)
    return {
        family: {
            way: np.array([astuple(outcomes[way]) for outcomes in own], dtype=np.float64)
            for way in ways
        }
        for family, own in played.items()
    }


def claims(worlds: int, first: int = 0, workers: int = 1) -> Floats:
    """(claims, 2): with which probability the larger of two mixtures on the way of a plain search
    was said to be better, and whether it is: 1, 0, or 0.5 if they are equals."""
    played = _in_all_families(_claims_in, worlds, first, workers)
    return np.array([claim for own in played.values() for each in own for claim in each])


def _claims_in(world: World) -> list[tuple[float, float]]:
    run = Memory(world)
    choice = search(world.pool, Greedy(), Plain(), run, resamples=0)
    stood = [decided.incumbent.members for decided in choice.rounds if decided.incumbent]
    measured = {t.members: Measured(t.members, (result,)) for t, result in run.known.items()}
    expected = Expected(Evidence(measured, resamples=0))
    found = []
    for small, large in combinations(stood, 2):
        lead = world.true_score(large) - world.true_score(small)
        truth = 0.5 if abs(lead) < 1e-12 else float(lead > 0)
        found.append((expected.better(large, small), truth))
    return found


def _in_all_families(
    play_one: Callable[[World], Found], worlds: int, first: int, workers: int
) -> dict[str, list[Found]]:
    jobs = [(family, first + number) for family in FAMILIES for number in range(worlds)]
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            played = list(pool.map(partial(_in_world, play_one), jobs, chunksize=4))
    else:
        played = [_in_world(play_one, job) for job in jobs]
    starts = range(0, len(jobs), worlds)
    return {f: played[start : start + worlds] for f, start in zip(FAMILIES, starts, strict=True)}


def _in_world(play_one: Callable[[World], Found], job: tuple[str, int]) -> Found:
    return play_one(make_world(*job))


def overall(found: Mapping[str, Mapping[str, Floats]]) -> dict[str, Floats]:
    """Way -> the outcomes of all families, which are equally many."""
    ways = next(iter(found.values()))
    return {way: np.concatenate([family[way] for family in found.values()]) for way in ways}


def column(values: Floats, name: str) -> Floats:
    """One field of `Outcome` (worlds,)."""
    return values[:, [each.name for each in fields(Outcome)].index(name)]
