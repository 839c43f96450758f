"""The search from its settings to its report: check, make what it starts from, choose, tell.

    OUT/search.json     the settings, resolved: another search is refused here
    OUT/ledger.jsonl    a line for every trial that has ended
    OUT/experts, stages, scores     where jobs work (`train.search.stages`)
    OUT/model           the chosen mixture's checkpoint
    OUT/report.*, summary.json      written after every round and at the end

Killed at any moment it goes on when it is started again.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.identity import describe_machine, library_versions
from train.jobs import run_jobs
from train.jobs.directory import Lock
from train.search.executors import Executor, open_executor
from train.search.features import with_features
from train.search.inputs import SearchInputs, resolve, unfinished
from train.search.keys import SHORT, code_version
from train.search.ledger import LEDGER, Ledger
from train.search.record import SearchRecord, WorkClock, now, open_record
from train.search.report import SearchFacts, write_report
from train.search.rounds import Choice, Round
from train.search.settings import AUTO, SearchSettings
from train.search.stages import Planner
from train.search.strategies import search
from train.search.tally import tally
from train.search.trial import Members
from train.search.trials import Planner as AnyPlanner
from train.search.trials import Trials

LOCK = "search.lock"
MODEL = "model"


def run_search(settings: SearchSettings, out: str | Path, retry_failed: bool = False) -> Choice:
    """Search, or go on where a search in `out` was interrupted.

    `retry_failed`: trials that have failed are run again. Raises `ValueError` or
    `FileNotFoundError` for what a person can mend, and `DirectoryBusy` if a driver is at work in
    `out`. Signals that ask to stop end the program in order.
    """
    out = Path(out)
    inputs = resolve(settings)
    code = code_version() if settings.code == AUTO else settings.code
    with ExitStack() as stack:
        lock = Lock.take(out, LOCK)
        stack.callback(lock.release)
        if unfinished(inputs.material):
            run_jobs(inputs.material, slots=settings.executor.slots, title="material")
        inputs.check_files()
        record = open_record(out, inputs, code)
        executor = open_executor(settings.executor)
        stack.callback(executor.close)
        planner = Planner(
            with_features(inputs.recipe, record.features),
            inputs.settings.evaluation,
            out,
            Path(settings.store),
            code,
            reuse=settings.reuse,
            gpus=settings.gpus_per_trial,
            threads=settings.threads,
        )
        return Driver(inputs, record, planner, executor, out, retry_failed).run()


class Driver:
    """Takes a search through its rounds, and tells of them. The lock on `out` is held."""

    def __init__(
        self,
        inputs: SearchInputs,
        record: SearchRecord,
        planner: AnyPlanner,
        executor: Executor,
        out: Path,
        retry_failed: bool = False,
    ) -> None:
        self.inputs = inputs
        self.record = record
        self.out = out
        self.ledger = Ledger(out / LEDGER)
        self.clock = WorkClock(out)
        told = {"search": record.key, "code": record.code}
        self.trials = Trials(planner, executor, self.ledger, told, retry_failed)
        self.trials.on_row = self.clock.note
        self.rounds: list[Round] = []

    def run(self) -> Choice:
        """Search to the end and write the report."""
        settings = self.inputs.settings
        self._begin()
        try:
            choice = search(
                self.inputs.pool,
                settings.make_strategy(),
                settings.make_rule(),
                self.trials,
                seeds=settings.seeds,
                halving=settings.make_halving(),
                on_round=self._decided,
            )
        finally:
            self._tell_failures()
        self._keep({choice.chosen}, choice.chosen)
        self.clock.note()
        written = write_report(choice, self._facts(finished=True), self.out)
        self._end(choice, written)
        return choice

    def _begin(self) -> None:
        for reason in self.record.features.reasons:
            print(reason)
        if self.ledger.rows:
            print(f"{self.ledger.path}: {len(self.ledger.by_key)} trials have ended before")
        self.trials.title = "round 1"

    def _tell_failures(self) -> None:
        failed = [row for row in self.ledger.by_key.values() if row["status"] == "failed"]
        if failed:
            names = ", ".join(f"{'+'.join(row['members'])} seed {row['seed']}" for row in failed)
            print(f"failed: {names}. With --retry-failed they are run again.", flush=True)

    def _decided(self, decision: Round) -> None:
        """A round is over: tell, write the report so far, make room."""
        self.rounds.append(decision)
        self.trials.title = f"round {decision.number + 1}"
        print(f"round {decision.number}: {decision.reason}", flush=True)
        so_far = decision.chosen or (decision.incumbent.members if decision.incumbent else ())
        settings = self.inputs.settings
        choice = Choice(
            so_far, tuple(self.rounds), settings.strategy["kind"], settings.rule["kind"]
        )
        write_report(choice, self._facts(finished=False), self.out)
        # the search may go back to any that it stood at
        stood = {one.incumbent.members for one in self.rounds if one.incumbent}
        self._keep({so_far, *stood}, so_far)

    def _keep(self, mixtures: set[Members], best: Members) -> None:
        """Link the checkpoint of `best`, and remove those of mixtures not among these if asked."""
        kept: set[str] = set()
        for row in self.ledger.by_key.values():
            if tuple(row["members"]) in mixtures or row["status"] == "failed":
                kept |= {stage["key"] for stage in row["stages"]}
        if self.inputs.settings.keep == "chosen":
            for row in self.ledger.by_key.values():
                for stage in row["stages"]:
                    if not stage["expert"] and stage["key"] not in kept:
                        shutil.rmtree(self._folder(stage), ignore_errors=True)
        own = [row for row in self.ledger.by_key.values() if tuple(row["members"]) == best]
        whole = [row for row in own if row["status"] == "done" and row["budget"] == 1]
        if whole:
            self._link(whole[0]["stages"][-1])

    def _folder(self, stage: dict[str, Any]) -> Path:
        return self.out / "stages" / stage["key"][:SHORT]

    def _link(self, stage: dict[str, Any]) -> None:
        beside = self.out / f".{MODEL}"
        beside.unlink(missing_ok=True)
        place = self._folder(stage) / stage["stage"]
        beside.symlink_to(place.relative_to(self.out), target_is_directory=True)
        beside.replace(self.out / MODEL)

    def _facts(self, finished: bool) -> SearchFacts:
        settings = self.inputs.settings
        reuse, clock = tally(self.ledger.by_key.values())
        return SearchFacts(
            title=settings.name,
            pool=self.inputs.pool.names,
            base=self.inputs.pool.base,
            ledger=tuple(self.ledger.rows),
            finished=finished,
            reuse=reuse,
            clock=replace(clock, wall=self.clock.wall, started=self.clock.started, finished=now()),
            settings=settings.dump(),
            fingerprints={"search": self.record.key, "code": self.record.code},
            versions=library_versions(),
            machine=describe_machine(),
            notes=tuple(self.record.features.reasons),
        )

    def _end(self, choice: Choice, written: list[Path]) -> None:
        reuse, _ = tally(self.ledger.by_key.values())
        saved = f", {reuse.steps_without_reuse} without reuse" if self.inputs.settings.reuse else ""
        print(f"chosen: {', '.join(choice.chosen)}")
        print(
            f"{len(self.ledger.by_key)} trials, {reuse.pre_alignments} pre-alignments "
            f"({reuse.experts_found} more from the store), {reuse.steps} steps{saved}"
        )
        print(f"The report: {', '.join(map(str, written))}. The model: {self.out / MODEL}")
