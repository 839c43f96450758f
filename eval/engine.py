"""One task through lmms-eval: a model object answers, the task's own scorer scores."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eval.judge import JudgeMissing, refuse_judges
from eval.outcome import Outcome, read_outcome


def score(lm: Any, task: Any, out: Path, limit: int | None = None) -> Outcome | None:
    """Have `lm` answer the task's questions, and its scorer score them; None but on rank 0.

    Where the scorer asks a judge and there is no key for one, the answers are kept and no number
    is made up. Files that a task writes, such as submissions, go into `out`.
    """
    metrics = list(task.aggregation())
    try:
        with refuse_judges():
            results = _simple_evaluate(lm, task, out, limit)
    except JudgeMissing as missing:
        if processes() > 1:
            raise ValueError(f"task {task.config.task}: {missing} Or use one process.") from None
        results = _simple_evaluate(lm, task, out, limit, predict_only=True)
        assert results is not None
        not_run = dict.fromkeys(metrics, str(missing))
        return replace(read_outcome(task, results), not_run=not_run, primary=metrics[0])
    return None if results is None else read_outcome(task, results)


def _simple_evaluate(
    lm: Any, task: Any, out: Path, limit: int | None, predict_only: bool = False
) -> dict[str, Any] | None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    results: dict[str, Any] | None = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
        predict_only=predict_only,
        process_docs_parallel=1,  # a scorer that guesses draws its guesses in one order
        distributed_executor_backend="torchrun",
        cli_args=Namespace(output_path=str(out), process_with_media=False),
    )
    if results is None and rank() == 0:
        raise RuntimeError(f"task {task.config.task}: lmms-eval returned no results.")
    return results


@contextmanager
def process_group() -> Iterator[None]:
    """Under torchrun, with collectives for the host and, where there are GPUs, for those."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(own: dict[str, float]) -> list[dict[str, float]]:
    """`own` of every process, in their order."""
    every: list[Any] = [own]
    if processes() > 1:
        every = [None] * processes()
        dist.all_gather_object(every, own)
    return every
