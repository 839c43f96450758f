"""Nothing of a job outlives it or the runner, whatever it has started and whoever was killed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from tests.processes import alive, assert_gone, start_program, wait_for
from train.jobs import Job, JobFailure, JobResult, LocalPlace, progress, try_jobs
from train.jobs.keeper import BEAT, COMMAND, new_mark
from train.jobs.place import Ending
from train.jobs.worker import MARK, Task

RANK = """
import os, sys, time
open(f"{sys.argv[1]}/rank{os.environ['RANK']}.txt", "w").write(str(os.getpid()))
time.sleep(120)
"""
DAEMON = """
import os, sys, time
if os.fork():
    os._exit(0)
os.setsid()
open(f"{sys.argv[1]}/daemon.txt", "w").write(str(os.getpid()))
time.sleep(120)
"""
SAVER = """
import os, signal, sys, time
def save(*_):
    time.sleep(1.0)
    open(f"{sys.argv[1]}/saved.txt", "w").write("saved")
    os._exit(0)
signal.signal(signal.SIGTERM, save)
open(f"{sys.argv[1]}/saver.txt", "w").write(str(os.getpid()))
time.sleep(120)
"""


def torchrun(out: Path) -> None:
    """A job that does its work in two ranks, each in a session of its own."""
    (out / "rank.py").write_text(RANK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([sys.executable, *launch, out / "rank.py", out], check=True)


def daemonize(out: Path, then: str = "") -> None:
    """A job that leaves a daemon: another session, its parent gone. It goes on, fails or ends."""
    subprocess.run([sys.executable, "-c", DAEMON, out], check=True)
    wait_for(out / "daemon.txt")
    (out / "job.txt").write_text(str(os.getpid()))
    if then == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif then == "sleep":
        time.sleep(120)


def save_in_a_child(out: Path) -> None:
    """A job that dies at SIGTERM, while what it has started still saves."""
    subprocess.run([sys.executable, "-c", SAVER, out], check=True)


def report_from_children(out: Path) -> None:
    """Two processes as a launcher starts them: the first one is heard."""
    say = "from train.jobs import progress; progress({}, 9, 'rank {}')"
    for rank in (1, 0):
        told = {**os.environ, "RANK": str(rank)}
        command = [sys.executable, "-c", say.format(rank + 3, rank)]
        subprocess.run(command, env=told, check=True, start_new_session=True)


def run(jobs: list[Job], **more: int) -> dict[str, JobResult | JobFailure]:
    return try_jobs(jobs, LocalPlace(2, 0, preload=("pytest",)), **more)


def runner(tmp_path: Path, job: str) -> subprocess.Popen[str]:
    source = (
        "from tests.test_jobs_keeper import *\n"
        'if __name__ == "__main__":\n'
        f"    print(run([Job('a', {job}, out / 'a')]))\n"
    )
    return start_program(tmp_path, source)


def read_pid(path: Path) -> int:
    return int(wait_for(path, 60))


def parents(pid: int, count: int) -> list[int]:
    return [process.pid for process in psutil.Process(pid).parents()[:count]]


def test_ranks_of_torchrun_end_with_a_runner_that_was_killed(tmp_path: Path) -> None:
    started = runner(tmp_path, "torchrun, {}")
    ranks = [read_pid(tmp_path / "a" / f"rank{n}.txt") for n in (0, 1)]
    assert {os.getsid(pid) for pid in ranks} == set(ranks), "killing a group would not reach them"
    launcher_job_keeper = parents(ranks[0], 3)
    started.kill()
    started.wait()
    assert_gone([*ranks, *launcher_job_keeper])


@pytest.mark.parametrize("killed", ["runner", "job", "keeper"])
def test_a_daemon_of_a_job_ends_with_whatever_was_killed(tmp_path: Path, killed: str) -> None:
    started = runner(tmp_path, "daemonize, {'then': 'sleep'}")
    daemon, job = (read_pid(tmp_path / "a" / name) for name in ("daemon.txt", "job.txt"))
    (keeper,) = parents(job, 1)
    assert parents(daemon, 1) == [keeper], "orphans are the keeper's"
    os.kill({"runner": started.pid, "job": job, "keeper": keeper}[killed], signal.SIGKILL)
    said, _ = started.communicate(timeout=20)
    assert_gone([daemon, job, keeper], 10 if killed == "runner" else 0)
    if killed != "runner":
        assert {"job": "ended by SIGKILL", "keeper": "lost"}[killed] in said


def test_what_a_finished_job_leaves_behind_is_gone_when_it_has_ended(tmp_path: Path) -> None:
    run([Job("a", daemonize, {}, tmp_path / "a")])
    assert not alive(read_pid(tmp_path / "a" / "daemon.txt"))


def test_a_child_that_saves_at_sigterm_is_given_its_time(tmp_path: Path) -> None:
    started = runner(tmp_path, "save_in_a_child, {}")
    saver = read_pid(tmp_path / "a" / "saver.txt")
    started.terminate()
    started.communicate(timeout=20)
    assert (tmp_path / "a" / "saved.txt").exists()
    assert_gone([saver])


def test_progress_of_programs_that_a_job_starts_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "train.jobs.display.PlainDisplay.report", lambda _, *message: seen.append(message)
    )
    run([Job("a", report_from_children, {}, tmp_path / "a")])
    assert seen == [("a", 3, 9, "rank 0")]
    monkeypatch.setenv(MARK, new_mark())
    progress(1, 2, "to nobody, which is no error")


# -- a keeper by itself, as a cluster starts it


def start_keeper(out: Path, lease: float) -> Connection:
    call = pickle.dumps((daemonize, {"then": "sleep"}))
    task = Task("a", call, out, 1, "print", new_mark(), ("5", "7"), lease)
    ours, keepers = multiprocessing.Pipe()
    subprocess.run(
        [*COMMAND, str(keepers.fileno())],
        pass_fds=[keepers.fileno()],
        cwd=Path(__file__).parents[1],
        check=True,
    )
    keepers.close()
    ours.send((sys.path, task))
    return ours


def heard(owner: Connection) -> list[object]:
    found = []
    with suppress(EOFError):
        while True:
            found.append(owner.recv())
    return found


def test_a_keeper_that_hears_nothing_ends_its_job(tmp_path: Path) -> None:
    owner = start_keeper(tmp_path, lease=2.0)
    pids = [read_pid(tmp_path / name) for name in ("daemon.txt", "job.txt")]
    (keeper,) = parents(pids[1], 1)
    for _ in range(6):
        owner.send(BEAT)
        time.sleep(0.5)
    assert all(map(alive, pids)), "it was kept for longer than the lease"
    assert heard(owner) == [pids[1], Ending(-signal.SIGKILL)]
    assert_gone(pids, 0)
    assert_gone([keeper])


def test_a_keeper_whose_owner_is_gone_ends_its_job(tmp_path: Path) -> None:
    owner = start_keeper(tmp_path, lease=1000)
    pids = [read_pid(tmp_path / name) for name in ("daemon.txt", "job.txt")]
    (keeper,) = parents(pids[1], 1)
    assert os.getpid() not in parents(keeper, 9), "nobody's child, so that nobody kills it first"
    owner.close()
    assert_gone([keeper])
    assert_gone(pids, 0)
