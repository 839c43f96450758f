"""Which mixtures a search tries, and the search itself: propose, try, decide, go on or stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Protocol

import numpy as np

from train.search.board import Board
from train.search.halving import Halving, with_agreement
from train.search.pool import Pool
from train.search.rounds import Choice, Proxy, Round
from train.search.rules import Rule, Step, named
from train.search.scores import RESAMPLES
from train.search.trial import ABSENT, Members, RunTrials, Trial


class Strategy(Protocol):
    """Where a search starts, and what it tries in round `number` (from 1)."""

    name: ClassVar[str]

    def start(self, pool: Pool) -> Members:
        """The first incumbent; () if there is none."""

    def proposals(self, pool: Pool, incumbent: Members, number: int) -> Sequence[Members]:
        """Mixtures to try; none ends the search."""


@dataclass(frozen=True)
class Greedy:
    """Forward: from the base, in every round each further expert alone. The paper's."""

    name: ClassVar[str] = "greedy"

    def start(self, pool: Pool) -> Members:
        return pool.base

    def proposals(self, pool: Pool, incumbent: Members, number: int) -> Sequence[Members]:
        return [pool.members((*incumbent, name)) for name in pool.outside(incumbent)]


@dataclass(frozen=True)
class Backward:
    """From the whole pool, in every round without one expert; the base always stays.

    A base that is the whole pool says where to start, and keeps nothing from going.
    """

    name: ClassVar[str] = "backward"

    def start(self, pool: Pool) -> Members:
        return pool.names

    def proposals(self, pool: Pool, incumbent: Members, number: int) -> Sequence[Members]:
        kept = pool.base if len(pool.base) < len(pool.names) else ()
        spare = [name for name in incumbent if name not in kept]
        if len(incumbent) == 1:
            return []
        return [tuple(other for other in incumbent if other != name) for name in spare]


@dataclass(frozen=True)
class Exhaustive:
    """One round of every mixture that contains the base; refused above `most`, with the count."""

    most: int = 64
    name: ClassVar[str] = "exhaustive"

    def start(self, pool: Pool) -> Members:
        return pool.base

    def proposals(self, pool: Pool, incumbent: Members, number: int) -> Sequence[Members]:
        if number > 1:
            return []
        total = _mixtures_beside(pool)
        if total > self.most:
            raise ValueError(
                f"strategy exhaustive: {total} mixtures, more than the {self.most} that "
                "`most` allows. Make the base larger or the pool smaller, or raise `most`."
            )
        spare = pool.outside(pool.base)
        return [
            pool.members((*pool.base, *more))
            for size in range(1, len(spare) + 1)
            for more in combinations(spare, size)
        ]


@dataclass(frozen=True)
class Random:
    """One round of `count` different mixtures that contain the base, drawn with `seed`."""

    count: int
    seed: int = 0
    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"strategy.count: {self.count}. Give 1 or more.")

    def start(self, pool: Pool) -> Members:
        return pool.base

    def proposals(self, pool: Pool, incumbent: Members, number: int) -> Sequence[Members]:
        if number > 1:
            return []
        spare, total = pool.outside(pool.base), _mixtures_beside(pool)
        if self.count > total:
            raise ValueError(f"strategy random: count {self.count}, but there are only {total}.")
        rng = np.random.default_rng(self.seed)
        drawn: dict[Members, None] = {}
        while len(drawn) < self.count:
            more = [name for name in spare if rng.random() < 0.5]
            if more:
                drawn[pool.members((*pool.base, *more))] = None
        return list(drawn)


def search(
    pool: Pool,
    strategy: Strategy,
    rule: Rule,
    run_trials: RunTrials,
    *,
    seeds: Sequence[int] = (0,),
    halving: Halving | None = None,
    on_round: Callable[[Round], None] | None = None,
    resamples: int = RESAMPLES,
) -> Choice:
    """Choose a mixture.

    `run_trials` gets all trials that can run at the same time together and never the same twice.
    `on_round` sees every round once it is decided. Given the same results the search is the same,
    so that a stopped one goes on by starting it again with a `run_trials` that remembers.

    The noise-aware rule ends with a round without trials, in which it looks back at all mixtures
    that the search stood at.

    `resamples`: of the bootstrap that intervals come from. 0 leaves out what reports are made of,
    intervals and decisions without each task in turn.

    Raises `ValueError` if the mixture that others are compared with cannot be scored, and if
    results cannot be compared.
    """
    board = Board(run_trials, seeds, resamples)
    rounds: list[Round] = []

    def decided(one: Round) -> None:
        rounds.append(one)
        if on_round is not None:
            on_round(one)

    incumbent = strategy.start(pool)
    steps: list[Step] = []
    while mixtures := strategy.proposals(pool, incumbent, len(rounds) + 1):
        proxies = _try(board, rule, incumbent, mixtures, halving)
        decided(_decide(board, rule, len(rounds) + 1, incumbent, mixtures, proxies))
        if incumbent:
            steps.append(Step(incumbent, tuple(board.scored(mixtures))))
        chosen = rounds[-1].chosen
        if chosen is None:
            break
        incumbent = chosen
    if not rounds:
        raise ValueError("pool: nothing to choose: it holds no expert beside the base.")
    if rounds[-1].chosen:
        steps.append(Step(incumbent, ()))
    back = _look_back(board, rule, len(rounds) + 1, steps)
    if back is not None and back.chosen is not None:
        decided(back)
        incumbent = back.chosen
    return Choice(incumbent, tuple(rounds), strategy.name, rule.name)


def _try(
    board: Board,
    rule: Rule,
    incumbent: Members,
    mixtures: Sequence[Members],
    halving: Halving | None,
) -> list[Proxy]:
    """Run the trials of a round: cheap ones if asked, full ones, and more where there is doubt."""
    seeds = rule.first(board.seeds)
    beside = board.full_trials(incumbent, seeds) if incumbent else []
    left: Sequence[Members] = mixtures
    proxies: list[Proxy] = []
    if halving is not None:
        left, proxies = halving.screen(board, mixtures, beside)
    trials = [trial for members in left for trial in board.full_trials(members, seeds)]
    board.ask([*beside, *trials])
    if incumbent and not board.scored([incumbent]):
        raise ValueError(
            f'"{named(incumbent)}", with which the others are to be compared, has no score: '
            f"{board.error(incumbent)}."
        )
    while more := _further(board, rule, incumbent, mixtures):
        board.ask(more)
    return with_agreement(proxies, board, mixtures)


def _further(
    board: Board, rule: Rule, incumbent: Members, mixtures: Sequence[Members]
) -> list[Trial]:
    scored = board.scored(mixtures)
    if not scored:
        return []
    doubtful = rule.doubtful(board.evidence(), incumbent, scored)
    return [trial for members in doubtful if (trial := board.next_seed(members)) is not None]


def _decide(
    board: Board,
    rule: Rule,
    number: int,
    incumbent: Members,
    mixtures: Sequence[Members],
    proxies: Sequence[Proxy],
) -> Round:
    evidence, scored = board.evidence(), board.scored(mixtures)
    candidates = tuple(board.candidate(members, incumbent) for members in mixtures)
    start = board.candidate(incumbent, ()) if incumbent else None
    if not scored and not incumbent:
        raise ValueError(f"round 1: no mixture could be scored: {candidates[0].error or ABSENT}.")
    if not scored:
        absent = all(board.error(members) == ABSENT for members in mixtures)
        why = "is in the table" if absent else "could be scored"
        reason = f"Stop: none of the {len(mixtures)} candidates {why}."
        return Round(number, start, candidates, None, reason, (), tuple(proxies))
    pick = rule.pick(evidence, incumbent, scored)
    reason = pick.reason
    if len(scored) < len(mixtures):
        reason += f" Without a score: {len(mixtures) - len(scored)} of {len(mixtures)}."
    others = {task: rule.pick(evidence.without(task), incumbent, scored) for task in _spare(board)}
    hinges = tuple(task for task, other in others.items() if other.chosen != pick.chosen)
    return Round(number, start, candidates, pick.chosen, reason, hinges, tuple(proxies))


def _look_back(board: Board, rule: Rule, number: int, steps: Sequence[Step]) -> Round | None:
    evidence = board.evidence()
    pick = rule.look_back(evidence, steps)
    if pick is None:
        return None
    last = steps[-1].members
    others = {task: rule.look_back(evidence.without(task), steps) for task in _spare(board)}
    hinges = tuple(t for t, other in others.items() if other and other.chosen != pick.chosen)
    candidates = tuple(board.candidate(step.members, last) for step in steps[:-1])
    return Round(number, board.candidate(last, ()), candidates, pick.chosen, pick.reason, hinges)


def _spare(board: Board) -> tuple[str, ...]:
    """Tasks to leave out one at a time."""
    tasks = board.evidence().tasks
    return tasks if len(tasks) > 1 and board.resamples else ()


def _mixtures_beside(pool: Pool) -> int:
    return int(2 ** len(pool.outside(pool.base))) - 1
