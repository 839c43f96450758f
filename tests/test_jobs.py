"""The job runner: order, parallel work, reuse, failure, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import alive, assert_gone, start_program, wait_for
from train.jobs import DirectoryBusy, Job, JobsFailed, progress, run_jobs


def note(out: Path, text: str = "", seconds: float = 0.0) -> None:
    """A job: leaves its text and the interval in which it ran."""
    start = time.time()
    time.sleep(seconds)
    (out / "note.json").write_text(json.dumps([text, start, time.time()]))


def fail(out: Path) -> None:
    print("about to fail")
    raise RuntimeError("the job is broken")


def count_runs(out: Path, stop_at: int = 0) -> None:
    """A job that resumes: every run adds a line; it hangs in run number `stop_at`."""
    with (out / "runs.txt").open("a") as file:
        file.write("run\n")
    if len((out / "runs.txt").read_text().splitlines()) == stop_at:
        time.sleep(60)


def report(out: Path) -> None:
    for step in range(1, 5):
        progress(step, 4, f"loss {1 / step:.2f}")


def spawn_child(out: Path) -> None:
    """A job with a process of its own, which must not outlive the run either."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (out / "pids.txt").write_text(f"{os.getpid()} {child.pid}")
    child.wait()


def stubborn(out: Path) -> None:
    """A job that takes its time to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (out / "pids.txt").write_text(f"{os.getpid()}")
    time.sleep(60)


def numbers_of_threads(out: Path) -> None:
    (out / "threads.txt").write_text(os.environ["OMP_NUM_THREADS"])


def run(jobs: list[Job], slots: int = 2) -> dict:
    return run_jobs(jobs, slots=slots, preload=("pytest",))


def read_note(out: Path) -> tuple[str, float, float]:
    return json.loads((out / "note.json").read_text())


def start_elsewhere(tmp_path: Path, jobs: str) -> subprocess.Popen[str]:
    """A runner in another process; `jobs` is the expression of its list of jobs."""
    source = f'from tests.test_jobs import *\nif __name__ == "__main__":\n    run({jobs})\n'
    return start_program(tmp_path, source)


def test_order_and_results(tmp_path):
    jobs = [
        Job("last", note, {"text": "c"}, tmp_path / "c", needs=["first", "middle"]),
        Job("middle", note, {"text": "b"}, tmp_path / "b", needs=["first"]),
        Job("first", note, {"text": "a"}, tmp_path / "a"),
    ]
    results = run(jobs)
    (_, _, first_end), (_, start, end), (text, last_start, _) = (
        read_note(tmp_path / name) for name in "abc"
    )
    assert text == "c" and first_end <= start and end <= last_start
    assert list(results) == ["last", "middle", "first"]
    assert not any(result.reused for result in results.values())
    assert results["last"].out == tmp_path / "c" and results["last"].seconds > 0


def test_slots_bound_what_runs_together(tmp_path):
    def spans(slots: int, threads: int) -> list[tuple[float, float]]:
        root = tmp_path / f"{slots}{threads}"
        run(
            [Job(n, note, {"seconds": 0.4}, root / n, threads=threads) for n in "abcd"],
            slots=slots,
        )
        return [read_note(root / name)[1:] for name in "abcd"]

    def most_together(spans: list[tuple[float, float]]) -> int:
        return max(sum(start <= at < end for start, end in spans) for at, _ in spans)

    assert most_together(spans(slots=2, threads=1)) == 2
    assert most_together(spans(slots=2, threads=2)) == 1
    assert most_together(spans(slots=4, threads=1)) > 2


def test_threads_reach_the_job(tmp_path):
    jobs = [Job(f"j{n}", numbers_of_threads, {}, tmp_path / f"{n}", threads=n) for n in (1, 2)]
    run(jobs)
    assert [(tmp_path / f"{n}/threads.txt").read_text() for n in (1, 2)] == ["1", "2"]


def test_second_run_reuses_and_a_change_redoes_what_follows(tmp_path, capsys):
    def jobs(text: str, version: str = "", **more) -> list[Job]:
        return [
            Job("a", note, {"text": text}, tmp_path / "a", version=version),
            Job("b", note, {}, tmp_path / "b", needs=["a"], **more),
            Job("other", note, {}, tmp_path / "other"),
        ]

    def reused(*args, **kwargs) -> list[str]:
        return [name for name, result in run(jobs(*args, **kwargs)).items() if result.reused]

    assert reused("x") == []
    seconds = run(jobs("x"))["a"].seconds
    assert reused("x") == ["a", "b", "other"]
    assert seconds == run(jobs("x"))["a"].seconds, "a reused result keeps the time it took"
    assert "a: reused" in capsys.readouterr().out
    assert reused("x", threads=2) == ["a", "b", "other"], "threads do not change a result"
    (tmp_path / "a" / "left-over.txt").write_text("of the earlier arguments")
    assert reused("y") == ["other"]
    assert read_note(tmp_path / "a")[0] == "y"
    assert not (tmp_path / "a" / "left-over.txt").exists()
    assert reused("y", version="2") == ["other"]


def test_failure_is_named_and_spares_the_independent(tmp_path, capsys):
    jobs = [
        Job("bad", fail, {}, tmp_path / "bad"),
        Job("after", note, {}, tmp_path / "after", needs=["bad"]),
        Job("after that", note, {}, tmp_path / "after2", needs=["after"]),
        Job("free", note, {"seconds": 0.3}, tmp_path / "free"),
        Job("after free", note, {}, tmp_path / "free2", needs=["free"]),
    ]
    with pytest.raises(JobsFailed) as failure:
        run(jobs)
    message = str(failure.value)
    assert "`bad`" in message and str(tmp_path / "bad" / "log.txt") in message
    assert "`after`" in message and "`after that`" in message and "`free`" not in message
    shown = capsys.readouterr().out
    assert "about to fail" in shown and "the job is broken" in shown
    assert read_note(tmp_path / "free") and read_note(tmp_path / "free2")
    assert not (tmp_path / "after" / "note.json").exists()
    with pytest.raises(JobsFailed):
        run(jobs)  # a failed job is not taken for a finished one


def test_progress_reaches_the_display(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "train.jobs.display.PlainDisplay.report", lambda _, *message: seen.append(message)
    )
    run([Job("a", report, {}, tmp_path / "a")])
    assert seen[0] == ("a", 1, 4, "loss 1.00") and seen[-1] == ("a", 4, 4, "loss 0.25")
    progress(1, 2, "outside a job this does nothing")


def test_plain_display_keeps_saying_what_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.jobs.display.PLAIN_EVERY", 0.1)
    run([Job("sleeper", note, {"seconds": 0.8}, tmp_path / "a")])
    assert capsys.readouterr().out.count("running: sleeper") >= 2


def test_killing_the_runner_leaves_no_process(tmp_path):
    runner = start_elsewhere(tmp_path, '[Job("a", spawn_child, {}, out / "a")]')
    pids = [int(pid) for pid in wait_for(tmp_path / "a" / "pids.txt").split()]
    assert all(alive(pid) for pid in pids)
    runner.kill()
    runner.wait()
    assert_gone(pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_the_runner_ends_the_jobs_and_says_how_to_continue(tmp_path, number):
    runner = start_elsewhere(
        tmp_path, '[Job("f", note, {}, out / "f"), Job("a", spawn_child, {}, out / "a")]'
    )
    pids = [int(pid) for pid in wait_for(tmp_path / "a" / "pids.txt").split()]
    wait_for(tmp_path / "f" / "note.json")
    runner.send_signal(number)
    said, _ = runner.communicate(timeout=20)
    assert runner.returncode == 128 + number
    assert "same command again" in said
    assert_gone(pids)


def test_stopping_the_runner_twice_ends_the_jobs_at_once(tmp_path):
    runner = start_elsewhere(tmp_path, '[Job("a", stubborn, {}, out / "a")]')
    pid = int(wait_for(tmp_path / "a" / "pids.txt"))
    runner.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert alive(pid)
    runner.send_signal(signal.SIGINT)
    runner.communicate(timeout=10)
    assert_gone([pid])


def test_interrupted_job_goes_on_in_its_directory(tmp_path):
    jobs = '[Job("a", count_runs, {"stop_at": 1}, out / "a")]'
    runner = start_elsewhere(tmp_path, jobs)
    wait_for(tmp_path / "a" / "runs.txt")
    runner.kill()
    runner.wait()
    results = run([Job("a", count_runs, {"stop_at": 1}, tmp_path / "a")])
    assert not results["a"].reused
    assert (tmp_path / "a" / "runs.txt").read_text() == "run\nrun\n"


def test_second_runner_on_a_directory_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr("train.jobs.directory.LOCK_WAIT", 0.1)
    runner = start_elsewhere(tmp_path, '[Job("a", spawn_child, {}, out / "a")]')
    wait_for(tmp_path / "a" / "pids.txt")
    jobs = [Job("z", note, {}, tmp_path / "z"), Job("a", note, {}, tmp_path / "a")]
    with pytest.raises(DirectoryBusy, match=f"{tmp_path / 'a'}.*process {runner.pid}"):
        run(jobs)
    assert not (tmp_path / "z" / "note.json").exists()
    runner.terminate()
    runner.communicate(timeout=20)
    run(jobs)


def test_a_directory_of_someone_else_is_not_cleared(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex.*not a job's directory"):
        run([Job("a", note, {}, tmp_path)])
    assert (tmp_path / "thesis.tex").exists()


def test_graphs_that_cannot_be_run(tmp_path):
    def job(name: str, **more) -> Job:
        fields = {"function": note, "kwargs": {}, "out": tmp_path / name, **more}
        return Job(name, **fields)

    for jobs, message in [
        ([job("a"), job("a", out=tmp_path / "b")], "two jobs are called `a`"),
        ([job("words"), job("b", needs=["wrods"])], "`b` needs `wrods`.*words"),
        ([job("a", needs=["b"]), job("b", needs=["a"])], "circle"),
        ([job("a"), job("b", out=tmp_path / "a")], "share a directory"),
        ([job("a"), job("b", out=tmp_path / "a" / "b")], "inside the directory of `a`"),
        ([job("a", kwargs={"txet": "x"})], "`a`.*txet"),
        ([job("a", kwargs={"text": object()})], "`a`.*not JSON"),
        ([job("a", function=lambda out: None)], "top of a module"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(jobs)
    assert not any(tmp_path.iterdir())
