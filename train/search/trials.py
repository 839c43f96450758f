"""Runs the trials that a search asks for, unless they have ended before, and writes them down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from train.jobs import Job, JobFailure, JobResult
from train.search.executors import Executor
from train.search.ledger import Ledger
from train.search.record import now
from train.search.scores import Evidence, Measured, score_of
from train.search.store import StageFacts
from train.search.trial import Cost, Result, Trial


class Stage(Protocol):
    """A stage of a trial, as far as the ledger tells of it."""

    @property
    def key(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def expert(self) -> str | None:
        """The one expert that it is about; None if it trains a mixture."""

    def facts(self) -> StageFacts | None: ...


class Plan(Protocol):
    """A trial as jobs, the last of which scores it (`train.search.stages.Plan`)."""

    @property
    def trial(self) -> Trial: ...
    @property
    def title(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def stages(self) -> Sequence[Stage]: ...
    @property
    def jobs(self) -> Sequence[Job]: ...
    def items(self) -> Mapping[str, Sequence[float]]: ...
    def cost(self) -> Cost: ...


class Planner(Protocol):
    def plan(self, trial: Trial) -> Plan: ...


class Trials:
    """What a strategy calls: `RunTrials`, with a ledger for memory.

    - `told`: goes into every line of the ledger.
    - `retry_failed`: trials that failed in an earlier sitting are run again.
    - `title`: of what runs now; `on_row`: called when a line was written. Both may be set.
    """

    title = "search"

    def __init__(
        self,
        planner: Planner,
        executor: Executor,
        ledger: Ledger,
        told: Mapping[str, Any],
        retry_failed: bool = False,
    ) -> None:
        self.planner = planner
        self.executor = executor
        self.ledger = ledger
        self.told = told
        self.on_row: Callable[[], None] = lambda: None
        failed = [key for key, row in ledger.by_key.items() if row["status"] == "failed"]
        self._again = set(failed) if retry_failed else set()
        self._batch = _Batch((), 0.0)

    def __call__(self, trials: Sequence[Trial]) -> list[Result]:
        plans = [self.planner.plan(trial) for trial in trials]
        new = [p for p in plans if p.key not in self.ledger.by_key or p.key in self._again]
        if new:
            self._run(new)
        return [_result(plan.trial, self.ledger.by_key[plan.key]) for plan in plans]

    def _run(self, plans: Sequence[Plan]) -> None:
        jobs = {job.name: job for plan in plans for job in plan.jobs}
        self._batch = _Batch(plans, time.monotonic())
        self._started = now()
        title = f"{self.title}, {len(plans)} trial{'s' if len(plans) != 1 else ''}"
        self.executor.run(list(jobs.values()), title, self._on_end)
        assert not self._batch.waiting, "the executor did not tell how every job ended"

    def _on_end(self, name: str, end: JobResult | JobFailure) -> None:
        """A job has ended: if it is the last of a trial, write that down."""
        self._batch.ends[name] = end
        plan = self._batch.waiting.pop(name, None)
        if plan is not None:
            row = self._row(plan)
            self.ledger.append(row)
            self._again.discard(plan.key)
            self.on_row()
            print(f"{plan.title}: {told_of(row)}{self._batch.outlook()}", flush=True)

    def _row(self, plan: Plan) -> dict[str, Any]:
        facts = [(stage, facts) for stage in plan.stages if (facts := stage.facts())]
        trial = plan.trial
        return {
            "key": plan.key,
            "members": list(trial.members),
            "seed": trial.seed,
            "budget": trial.budget,
            **self._outcome(plan),
            "steps": sum(each.steps for _, each in facts),
            "seconds": round(sum(each.seconds for _, each in facts), 3),
            "stages": [
                {"stage": stage.title, "expert": stage.expert, "key": stage.key, **asdict(each)}
                for stage, each in facts
            ],
            **self.told,
            "started": self._started,
            "finished": now(),
        }

    def _outcome(self, plan: Plan) -> dict[str, Any]:
        failures = [end for job in plan.jobs if _failed(end := self._batch.ends.get(job.name))]
        if failures:
            first = failures[0]  # those after it needed it
            assert isinstance(first, JobFailure)
            return _failure(f"{first.name}: {first.how}", first.log)
        items = {task: list(values) for task, values in plan.items().items()}
        mean = score_of(Result(plan.trial, items=items))
        if not math.isfinite(mean):
            log = plan.jobs[-1].directory
            return _failure(f"{plan.jobs[-1].name}: the score is {mean}, not a number", log)
        cost = asdict(plan.cost())
        return {"status": "done", "score": mean, "items": items, "cost": cost, "error": ""}


class _Batch:
    """The trials that run now: those still awaited by the name of their last job."""

    def __init__(self, plans: Sequence[Plan], started: float) -> None:
        self.waiting = {plan.jobs[-1].name: plan for plan in plans}
        self.ends: dict[str, JobResult | JobFailure] = {}
        self.started = started
        self.total = len(plans)

    def outlook(self) -> str:
        """How many are done and, by the pace so far, how long the others will take."""
        left, done = len(self.waiting), self.total - len(self.waiting)
        if not left:
            return ""
        minutes = (time.monotonic() - self.started) / done * left / 60
        return f" ({done} of {self.total}, about {max(1, round(minutes))} min for the others)"


def told_of(row: Mapping[str, Any]) -> str:
    """How a trial ended, in a few words: its score with the 95 % interval, or what failed."""
    if row["status"] == "failed":
        return f"failed: {row['error']}, log: {row['log']}"
    one = Measured((), (Result(Trial(()), row["score"], row["items"]),))
    found = Evidence({(): one}).interval(())
    spread = "" if found.low is None else f" ({found.low:.1%} to {found.high:.1%})"
    return f"{row['score']:.1%}{spread}"


def _failed(end: JobResult | JobFailure | None) -> bool:
    return isinstance(end, JobFailure)


def _failure(error: str, log: Path) -> dict[str, Any]:
    return {"status": "failed", "score": None, "items": {}, "error": error, "log": str(log)}


def _result(trial: Trial, row: Mapping[str, Any]) -> Result:
    if row["status"] == "failed":
        return Result(trial, error=f"{row['error']}, log: {row['log']}")
    return Result(trial, row["score"], row["items"], Cost(**row["cost"]))
