"""A job in several processes: they find each other, fail, are killed, are asked to stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.processes import assert_gone, start_program, wait_for
from train.jobs import Job, JobFailure, JobResult, LocalPlace, try_jobs

RANK = """
import json, os, signal, sys, time
from pathlib import Path

out, do = Path(sys.argv[1]), sys.argv[2]
rank, runs = os.environ["RANK"], len(list(Path(sys.argv[1]).glob("rank0-*")))
told = {name: os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")}
def save(*_):
    time.sleep(0.5)
    (out / f"saved{rank}").touch()
    sys.exit(75)
if do == "wait":
    signal.signal(signal.SIGTERM, save)
(out / f"rank{rank}-{os.getpid()}").write_text(json.dumps(told))
if do == "fail" and rank == "1":
    sys.exit(3)
if do == "kill" and rank == "0" and runs == 0:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(120 if do in ("wait", "fail") or do == "kill" and runs == 0 else 0)
"""


def ranks(out: Path, do: str) -> None:
    from train.jobs.ranks import run_ranks

    (out / "rank.py").write_text(RANK)
    run_ranks([str(out / "rank.py"), str(out), do], 2)
    (out / "after").touch()


def run(tmp_path: Path, do: str) -> JobResult | JobFailure:
    job = Job("a", ranks, {"do": do}, tmp_path / "a", threads=5)
    place = LocalPlace(8, 0, preload=("torch.distributed.launcher.api",))
    return try_jobs([job], place, retries=1)["a"]


def pids(out: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in out.glob("rank?-*")]


def test_ranks_know_of_each_other_and_share_the_threads(tmp_path: Path) -> None:
    assert isinstance(run(tmp_path, "nothing"), JobResult)
    told = [json.loads(path.read_text()) for path in sorted((tmp_path / "a").glob("rank?-*"))]
    assert [rank["LOCAL_RANK"] for rank in told] == ["0", "1"]
    assert all(r["WORLD_SIZE"] == r["OMP_NUM_THREADS"] == "2" for r in told)
    assert (tmp_path / "a" / "after").exists()


def test_a_rank_that_was_killed_is_another_attempt_and_one_that_fails_is_not(
    tmp_path: Path,
) -> None:
    assert isinstance(run(tmp_path, "kill"), JobResult)
    assert len(pids(tmp_path / "a")) >= 3
    end = run(tmp_path, "fail")
    assert end == JobFailure("a", "failed, exit code 1", tmp_path / "a" / "log.txt")
    assert "rank 1 ended with code 3" in end.log.read_text()
    assert_gone(pids(tmp_path / "a"), 0)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_save_when_the_runner_is_stopped_and_end_when_it_is_killed(
    tmp_path: Path, how: signal.Signals
) -> None:
    source = (
        "from tests.test_jobs_ranks import *\nif __name__ == \"__main__\":\n    run(out, 'wait')\n"
    )
    runner = start_program(tmp_path, source)
    out = tmp_path / "a"
    for rank in (0, 1):
        while not (found := list(out.glob(f"rank{rank}-*"))):
            assert runner.poll() is None
        wait_for(found[0])
    runner.send_signal(how)
    runner.communicate(timeout=30)
    assert_gone(pids(out))
    assert (out / "saved0").exists() == (out / "saved1").exists() == (how == signal.SIGTERM)
