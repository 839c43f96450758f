"""Which jobs run together, on which GPUs, and which are tried again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from pathlib import Path

import pytest

from train.jobs import Job, JobFailure, JobResult, LocalPlace, try_jobs
from train.jobs.directory import Lock
from train.jobs.local import visible_devices


def devices(out: Path, seconds: float = 0.3) -> None:
    """A job: leaves the GPUs that it sees and the interval in which it ran."""
    start = time.time()
    time.sleep(seconds)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    (out / "seen.json").write_text(json.dumps([seen, start, time.time()]))


def break_off(out: Path, how: str, times: int) -> None:
    """A job that ends badly in its first runs, and counts them in its directory."""
    runs = len(list(out.glob("run*")))
    (out / f"run{runs}").touch()
    if runs >= times:
        return
    if how == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        raise SystemExit(os.EX_TEMPFAIL)
    raise RuntimeError("a mistake of its own")


def run(jobs: list[Job], gpus: int | None = 0, **more: int) -> dict[str, JobResult | JobFailure]:
    return try_jobs(jobs, LocalPlace(8, gpus, preload=("pytest",)), **more)


def seen(out: Path) -> tuple[str | None, float, float]:
    return json.loads((out / "seen.json").read_text())


def test_jobs_that_run_together_have_gpus_of_their_own(tmp_path: Path) -> None:
    counts = {"a": 2, "b": 1, "c": 1, "d": 2, "e": 1, "f": 3}
    run([Job(n, devices, {}, tmp_path / n, gpus=k) for n, k in counts.items()], gpus=3)
    found = {name: seen(tmp_path / name) for name in counts}
    for name, (own, start, _) in found.items():
        assert own is not None
        assert len(set(own.split(",")) & {"0", "1", "2"}) == counts[name]
        together = [o for o, s, e in found.values() if s <= start < e]
        numbers = ",".join(filter(None, together)).split(",")
        assert len(numbers) == len(set(numbers)), found
    assert found["a"][1] < found["b"][2] and found["b"][1] < found["a"][2], "a and b fit together"


def test_without_gpus_of_its_own_a_job_sees_none_or_what_the_runner_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    jobs = [Job(str(n), devices, {"seconds": 0}, tmp_path / str(n), gpus=n) for n in (None, 0, 1)]
    run(jobs, gpus=None)
    assert [seen(tmp_path / n)[0] for n in ("0", "1")] == ["", "4"]


def test_a_job_that_asks_for_more_gpus_than_there_are_is_refused_at_once(tmp_path: Path) -> None:
    jobs = [Job("a", devices, {}, tmp_path / "a"), Job("b", devices, {}, tmp_path / "b", gpus=3)]
    with pytest.raises(ValueError, match="`b` asks for 3 GPUs, but there are 2 here"):
        run(jobs, gpus=2)
    assert not list(tmp_path.iterdir())


def test_small_jobs_do_not_overtake_a_big_one_but_fill_what_it_leaves(tmp_path: Path) -> None:
    place = LocalPlace(4, 2)

    def job(name: str, threads: int = 1, gpus: int = 0) -> Job:
        return Job(name, devices, {}, tmp_path / name, threads=threads, gpus=gpus)

    def admitted(*jobs: Job) -> str:
        return "".join(job.name for job in place.admit(jobs))

    assert admitted(job("a", 2), job("b", 3), job("c")) == "a"
    assert admitted(job("a", gpus=1), job("b", gpus=2), job("c", gpus=1), job("d")) == "ad"
    assert admitted(job("a", 9), job("b")) == "a", "it gets all the slots that there are"


def test_gpus_that_the_runner_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, expected in [
        ("", ()),
        ("-1", ()),
        ("0, 3", ("0", "3")),
        ("GPU-8f2,GPU-77a", ("GPU-8f2", "GPU-77a")),
        ("1,-1,2", ("1",)),
    ]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
        assert visible_devices() == expected


@pytest.mark.parametrize("how", ["signal", "exit"])
def test_a_job_that_was_cut_off_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    jobs = [
        Job("cut", break_off, {"how": how, "times": 2}, tmp_path / "cut"),
        Job("after", devices, {"seconds": 0}, tmp_path / "after", needs=["cut"]),
    ]
    assert all(isinstance(end, JobResult) for end in run(jobs, retries=2).values())
    assert len(list((tmp_path / "cut").glob("run*"))) == 3
    assert "attempt 3 of 3 follows" in capsys.readouterr().out


def test_what_fails_is_returned_and_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    jobs = [
        Job("cut", break_off, {"how": "signal", "times": 9}, tmp_path / "cut"),
        Job("bad", break_off, {"how": "error", "times": 9}, tmp_path / "bad"),
        Job("after", devices, {}, tmp_path / "after", needs=["bad"]),
        Job("last", devices, {}, tmp_path / "last", needs=["after"]),
        Job("free", devices, {"seconds": 0}, tmp_path / "free"),
    ]
    ends = run(jobs, retries=1)
    log = tmp_path / "bad" / "log.txt"
    assert ends["bad"] == JobFailure("bad", "failed, exit code 1", log)
    assert ends["cut"] == JobFailure(
        "cut", "failed, ended by SIGKILL (attempt 2)", tmp_path / "cut" / "log.txt"
    )
    assert ends["after"] == JobFailure("after", "not run, it needs `bad`", log)
    assert ends["last"] == JobFailure("last", "not run, it needs `after`", log)
    assert isinstance(ends["free"], JobResult)
    assert [len(list((tmp_path / name).glob("run*"))) for name in ("bad", "cut")] == [1, 2]


def test_storage_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match=f"{tmp_path}: its storage has no file locks"):
        Lock.take(tmp_path)
