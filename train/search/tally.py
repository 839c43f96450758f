"""From the ledger: what was done, and what a search that shares nothing would have done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from train.search.report import Clock, Reuse


def tally(rows: Iterable[Mapping[str, Any]]) -> tuple[Reuse, Clock]:
    """Steps, runs of stages and their seconds.

    Every row names all stages of its trial that have ended; those with equal keys were run once.
    """
    needed = [stage for row in rows for stage in row["stages"]]
    distinct = {stage["key"]: stage for stage in needed}.values()
    ran = [stage for stage in distinct if stage["trained"]]
    alone, mixed = _parted(ran)
    alone_needed, mixed_needed = _parted(needed)
    reuse = Reuse(
        steps=sum(stage["steps"] for stage in ran),
        steps_without_reuse=sum(stage["steps"] for stage in needed),
        pre_alignments=len(alone),
        pre_alignments_without_reuse=len(alone_needed),
        experts_found=len(distinct) - len(ran),
        stages=len(mixed),
        stages_without_reuse=len(mixed_needed),
    )
    clock = Clock(
        jobs=round(sum(stage["seconds"] for stage in ran), 1),
        jobs_without_reuse=round(sum(stage["seconds"] for stage in needed), 1),
    )
    return reuse, clock


def _parted(stages: Iterable[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Those of one expert alone, and those of mixtures."""
    every = list(stages)
    return [s for s in every if s["expert"]], [s for s in every if not s["expert"]]
