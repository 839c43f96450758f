"""Trials that cost nothing, for searches that are interrupted often. Imports no torch."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.jobs import Job, JobFailure, JobResult, OnEnd
from train.search.trial import Cost, Trial

ITEMS = 30
WORTH = {"clip": 0.3, "convnext": 0.05, "sam": 0.15, "eva02": 0.25, "dinov2": 0.0}
"""What each expert adds to the share of right answers, of the first task."""


def toy_align(out: Path, seconds: float) -> None:
    """Fails while there is a file `broken-<expert>` beside the search."""
    if (out.parents[1] / f"broken-{out.name}").exists():
        raise RuntimeError(f"{out.name} is broken")
    time.sleep(seconds)
    (out / "stage.json").write_text("{}")


def toy_score(out: Path, key: str, members: list[str], seed: int, seconds: float) -> None:
    """Writes what was answered; notes whether the trial had been written down before."""
    ledger = out.parents[1] / "ledger.jsonl"
    before = ledger.read_text().splitlines() if ledger.exists() else []
    if any(f'"{key}"' in line for line in before):
        (out.parents[1] / "ran-twice").write_text(key)
    time.sleep(seconds)
    if (out.parents[1] / f"broken-{'+'.join(members)}").exists():
        raise RuntimeError("no memory")
    right = sum(WORTH[name] for name in members)
    items = {}
    for task, share in (("charts", right), ("text", 0.2 + right / 2)):
        dice = random.Random(f"{members} {seed} {task}")
        items[task] = [float(dice.random() < share) for _ in range(ITEMS)]
    if (out.parents[1] / f"nan-{'+'.join(members)}").exists():
        items["text"][0] = float("nan")
    beside = out / "items.new"
    beside.write_text(json.dumps(items))
    os.replace(beside, out / "items.json")


@dataclass(frozen=True)
class ToyFacts:
    steps: int = 10
    seconds: float = 0.1
    trained: bool = True


@dataclass(frozen=True)
class ToyStage:
    title: str
    key: str
    expert: str | None
    folder: Path

    def facts(self) -> ToyFacts | None:
        return ToyFacts() if (self.folder / "stage.json").exists() else None


@dataclass(frozen=True)
class ToyPlan:
    trial: Trial
    title: str
    key: str
    stages: tuple[ToyStage, ...]
    jobs: tuple[Job, ...]

    def items(self) -> Mapping[str, Sequence[float]]:
        return json.loads((self.jobs[-1].directory / "items.json").read_text())

    def cost(self) -> Cost:
        return Cost(parameters=100.0 * len(self.trial.members))


@dataclass(frozen=True)
class ToyPlanner:
    """One job for each expert, which trials share, and one that scores."""

    out: Path
    seconds: float = 0.02

    def plan(self, trial: Trial) -> ToyPlan:
        name = f"{'+'.join(trial.members)} seed {trial.seed}"
        aligned = [
            Job(f"align {each}", toy_align, {"seconds": self.seconds}, self.out / "experts" / each)
            for each in trial.members
        ]
        told = {"members": list(trial.members), "seed": trial.seed, "seconds": self.seconds}
        score = Job(
            f"score {name}",
            toy_score,
            told | {"key": name},
            self.out / "scores" / name.replace(" ", "-"),
            [job.name for job in aligned],
        )
        stages = tuple(
            ToyStage(job.name, job.name, each, job.directory)
            for job, each in zip(aligned, trial.members, strict=True)
        )
        return ToyPlan(trial, name, name, stages, (*aligned, score))


class InlineExecutor:
    """Runs jobs one after the other in this process; `ran` has their names."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(
        self, jobs: Sequence[Job], title: str, on_end: OnEnd | None = None
    ) -> dict[str, JobResult | JobFailure]:
        ends: dict[str, JobResult | JobFailure] = {}
        for job in jobs:
            ends[job.name] = self._run(job, ends)
            if on_end is not None:
                on_end(job.name, ends[job.name])
        return ends

    def _run(self, job: Job, ends: Mapping[str, JobResult | JobFailure]) -> JobResult | JobFailure:
        log = job.directory / "log.txt"
        for need in job.needs:
            if isinstance(ends[need], JobFailure):
                return JobFailure(job.name, f"not run, it needs `{need}`", log)
        job.directory.mkdir(parents=True, exist_ok=True)
        self.ran.append(job.name)
        try:
            job.function(out=job.directory, **job.kwargs)
        except RuntimeError as error:
            return JobFailure(job.name, f"failed, {error}", log)
        return JobResult(0.1, False, job.directory)

    def close(self) -> None: ...
