"""What a search may say about the place where its jobs run, and the executor of one machine."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from eagle_moe.schema import Schema
from tests.cluster_jobs import note_gpus
from train.jobs import Job, JobFailure, JobResult
from train.search.executors import ExecutorSettings, open_executor


class Search(Schema):
    executor: ExecutorSettings = ExecutorSettings()


def test_the_local_executor_runs_graphs_and_returns_what_fails(tmp_path: Path) -> None:
    told = []
    jobs = [
        Job("a", note_gpus, {}, tmp_path / "a", gpus=2),
        Job("b", note_gpus, {"fail": True}, tmp_path / "b", gpus=1),
        Job("c", note_gpus, {}, tmp_path / "c", gpus=0, needs=["b"]),
    ]
    with closing(open_executor(ExecutorSettings(slots=2, gpus=2))) as executor:
        executor.place._preload = ()  # type: ignore[attr-defined]
        ends = executor.run(jobs, "round 1", on_end=lambda name, end: told.append((name, end)))
        assert isinstance(ends["a"], JobResult) and (tmp_path / "a/gpus.txt").read_text() == "0,1"
        assert isinstance(ends["b"], JobFailure) and isinstance(ends["c"], JobFailure)
        assert dict(told) == ends
        assert executor.run(jobs[:1], "round 2")["a"].reused  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="asks for 3 GPUs, but there are 2 here"):
            executor.run([Job("d", note_gpus, {}, tmp_path / "d", gpus=3)], "round 3")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"kind": "slurm"}, "executor.kind.*slurm.*'local' or 'ray'"),
        ({"kind": "ray", "gpus": 2}, "`gpus` is of kind: local, but kind is ray"),
        ({"address": "a:1"}, "`address` is of kind: ray, but kind is local"),
        ({"kind": "ray", "adress": "a:1"}, 'unknown key `executor.adress`.*"address"'),
        ({"retries": -1}, "executor.retries"),
        ({"slots": 0}, "executor.slots"),
    ],
)
def test_settings_that_mean_nothing_are_refused(told: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Search.parse({"executor": told}, "search.yaml")
