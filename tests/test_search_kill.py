"""Searches that are killed, driver or worker, end where one that was left alone ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import closing, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

import train.search.run
from eagle_moe.checkpoint import replace_text
from tests.processes import assert_gone, jobs_of, marked
from tests.toy_trials import ToyPlanner
from train.jobs import LocalPlace, try_jobs
from train.jobs.directory import Lock
from train.recipe import load_recipe
from train.search.features import FeatureChoice
from train.search.inputs import SearchInputs
from train.search.ledger import Ledger
from train.search.pool import Pool
from train.search.record import SearchRecord
from train.search.report import SearchFacts
from train.search.report.summary import SUMMARY, summarise
from train.search.rounds import Choice
from train.search.run import LOCK, Driver
from train.search.settings import SearchSettings

POOL = Pool(("clip", "convnext", "sam", "eva02"), ("clip",))
DRIVER_KILLS, WORKER_KILLS = 10, 5
MARK = "EAGLE_MOE_TEST_SEARCH"


class LightExecutor:
    """The local one, but jobs are forked from a process that has imported nothing."""

    def run(self, jobs: Any, title: str, on_end: Any) -> Any:
        place = LocalPlace(2, 0, preload=())
        return try_jobs(jobs, place, title=title, retries=3, on_end=on_end)

    def close(self) -> None: ...


def drive(out: Path, seconds: float) -> None:
    """What `train.search.run.run_search` does, with trials that cost nothing."""
    told = {
        "name": "toy",
        "recipe": "configs/recipes/mini.yaml",
        "evaluation": {"data": "none"},
        "seeds": [0, 1],
    }
    settings = SearchSettings.parse(told, "toy")
    inputs = SearchInputs(settings, load_recipe("configs/recipes/mini.yaml"), POOL)
    features = FeatureChoice(stages=[], reasons=[])
    record = SearchRecord(code="1", identity={"toy": 1}, features=features, settings={})
    lock = Lock.take(out, LOCK)
    with closing(LightExecutor()) as executor:
        Driver(inputs, record, ToyPlanner(out, seconds), executor, out).run()
    lock.release()


def write_summary(choice: Choice, facts: SearchFacts, out: Path) -> list[Path]:
    """What a report says, without its pictures."""
    replace_text(out / SUMMARY, json.dumps(summarise(choice, facts)))
    return [out / SUMMARY]


class Attempt:
    """A driver in a process of its own; all that it starts carries a mark."""

    def __init__(self, out: Path, seconds: float = 0.02) -> None:
        self.seconds = seconds
        self.out, self.mark = out, f"{MARK}={out}"
        self.log = out.with_name(f"{out.name}.log")
        self.process = multiprocessing.get_context("fork").Process(target=self._work)
        self.process.start()

    def _work(self) -> None:
        os.environ[MARK] = str(self.out)
        forkserver._forkserver.__init__()  # the parent's is not this process's to use
        sys.stdout = sys.stderr = self.log.open("a", buffering=1)
        train.search.run.write_report = write_summary
        drive(self.out, self.seconds)

    def exit_code(self) -> int:
        self.process.join(120)
        assert self.process.exitcode is not None, self.log.read_text()
        return self.process.exitcode

    def assert_nothing_is_left(self) -> None:
        assert_gone(list(marked(self.mark)))


def result(out: Path) -> dict[str, Any]:
    """All that a search came to, but what the clock says."""
    told = json.loads((out / SUMMARY).read_text())
    del told["clock"]
    rows = {
        row["key"]: (row["status"], row["score"], row["items"])
        for row in Ledger(out / "ledger.jsonl").rows
    }
    return {**told, "rows": rows}


def assert_each_ran_once(out: Path) -> None:
    rows = Ledger(out / "ledger.jsonl").rows
    assert len({row["key"] for row in rows}) == len(rows)
    assert all(row["status"] == "done" for row in rows)
    assert not (out / "ran-twice").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    started = time.monotonic()
    attempt = Attempt(out)
    assert attempt.exit_code() == 0, attempt.log.read_text()
    attempt.assert_nothing_is_left()
    return out, time.monotonic() - started


def test_an_undisturbed_search_goes_through_several_rounds(undisturbed):
    out, _ = undisturbed
    told = result(out)
    assert len(told["rounds"]) >= 2
    assert {"clip", "eva02"} <= set(told["chosen"])
    assert len({row[1] for row in told["rows"].values()}) > 5
    assert any("seed 1" in key for key in told["rows"])
    assert_each_ran_once(out)


def test_killed_drivers_change_nothing(undisturbed, tmp_path):
    expected, seconds = result(undisturbed[0]), undisturbed[1]
    dice, kills, number = random.Random(3), 0, 0
    while kills < DRIVER_KILLS:
        out = tmp_path / f"{number}"
        number += 1
        while True:
            attempt = Attempt(out)
            if kills < DRIVER_KILLS:
                attempt.process.join(dice.uniform(0, seconds / 2))
                attempt.process.kill()  # nothing, if it has just ended by itself
            code = attempt.exit_code()
            assert code in (0, -signal.SIGKILL), attempt.log.read_text()
            attempt.assert_nothing_is_left()
            kills += code != 0
            if code == 0:
                break
        assert result(out) == expected
        assert_each_ran_once(out)


def test_killed_workers_change_nothing(undisturbed, tmp_path):
    out, dice, kills = tmp_path / "out", random.Random(4), 0
    attempt = Attempt(out, seconds=0.4)
    while attempt.process.is_alive() and kills < WORKER_KILLS:
        attempt.process.join(dice.uniform(0, 0.3))
        if jobs := jobs_of(attempt.process.pid, attempt.mark):
            with suppress(ProcessLookupError):
                os.kill(dice.choice(jobs), signal.SIGKILL)
                kills += 1
    assert attempt.exit_code() == 0, attempt.log.read_text()
    assert kills == WORKER_KILLS
    assert attempt.log.read_text().count("attempt 2") >= 1
    assert result(out) == result(undisturbed[0])
    assert_each_ran_once(out)
    attempt.assert_nothing_is_left()
