"""How long one job takes on this machine, by the clock: for plans and costs, not for comparisons
(those are `eval.speed.rounds`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def median_seconds(
    work: Callable[[], object], device: torch.device, budget: float = 1.0, fewest: int = 3
) -> float:
    """Median seconds of one call of `work`; on a GPU, until what it started is done.

    It runs once before anything is timed, then for `budget` seconds and at least `fewest` times.
    """
    _timed(work, device)
    times: list[float] = []
    while len(times) < fewest or sum(times) < budget:
        times.append(_timed(work, device))
    return median(times)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
