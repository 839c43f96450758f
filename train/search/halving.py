"""Successive halving inside a round: cheap trials first, full ones for those that do well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from train.search.board import Board
from train.search.rounds import Proxy
from train.search.scores import score_of
from train.search.trial import Members, Trial


@dataclass(frozen=True)
class Halving:
    """Rising `budgets` (shares of the steps, below 1); after each the best `keep` go on.

    The last survivors are trained in full. Jamieson and Talwalkar 2016 (arXiv 1502.07943).
    """

    budgets: tuple[float, ...] = (0.25,)
    keep: float = 0.5

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in zip(self.budgets, self.budgets[1:], strict=False))
        if not self.budgets or not rising or not all(0 < budget < 1 for budget in self.budgets):
            raise ValueError(
                f"halving.budgets: {list(self.budgets)}. Give rising shares of the steps, each "
                "between 0 and 1; full trials follow by themselves."
            )
        if not 0 < self.keep < 1:
            raise ValueError(f"halving.keep: {self.keep}. Give the share that goes on, below 1.")

    def screen(
        self, board: Board, mixtures: Sequence[Members], beside: Sequence[Trial]
    ) -> tuple[list[Members], list[Proxy]]:
        """Who survives all cheap trials; `beside` are trials that run with the first of them."""
        left, proxies = list(mixtures), []
        for budget in self.budgets:
            if len(left) < 2:
                break
            trials = [Trial(members, board.seeds[0], budget) for members in left]
            board.ask([*beside, *trials])
            scores = {m: score_of(result) for m in left if (result := board.proxy(m, budget))}
            kept = math.ceil(self.keep * len(left))
            best = sorted(scores, key=lambda members: -scores[members])[:kept]
            proxies.append(Proxy(budget, len(left), len(best), None))
            left = [members for members in left if members in best]
        return left, proxies


def with_agreement(
    proxies: Sequence[Proxy], board: Board, mixtures: Sequence[Members]
) -> list[Proxy]:
    """The same with Kendall's tau between cheap and full scores where at least two have both."""
    told = []
    evidence = board.evidence()
    for proxy in proxies:
        pairs = [
            (score_of(result), evidence.score(members))
            for members in board.scored(mixtures)
            if (result := board.proxy(members, proxy.budget))
        ]
        told.append(replace(proxy, rank_agreement=kendall_tau(pairs)))
    return told


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau-b (1945), which counts ties; None where one side is all ties.

    1: the same order, -1: the reverse.
    """
    signs = [
        (_sign(a[0] - b[0]), _sign(a[1] - b[1]))  # of every two mixtures
        for a, b in combinations(pairs, 2)
    ]
    untied = math.sqrt(sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs))
    return sum(x * y for x, y in signs) / untied if untied else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
