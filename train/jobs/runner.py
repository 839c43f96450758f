"""The runner: starts what is ready, listens, keeps order when something fails or it is stopped."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType

import joblib

from train.jobs.directory import LOG, Lock, prepare, read_record, refuse_foreign
from train.jobs.display import Display, open_display
from train.jobs.graph import Job, fingerprints
from train.jobs.worker import THREAD_VARIABLES, Task, progress, work

PRELOAD = ("torch", "transformers", "transformers.modeling_utils")
"""Imported once, by the process that all jobs are forked from."""
GRACE = 25.0
"""Seconds that a job has between SIGTERM and SIGKILL when the run is stopped, so that training can
save a step: less than the 30 that schedulers commonly give."""
_TAIL = 25
_TICK = 0.2


@dataclass(frozen=True)
class JobResult:
    """`seconds`: wall time of the run that made `out`. `reused`: it was an earlier run."""

    seconds: float
    reused: bool
    out: Path


@dataclass(frozen=True)
class JobFailure:
    """Why a job did not finish, in a sentence, and the log that says more."""

    name: str
    how: str
    log: Path


class JobsFailed(RuntimeError):
    """Some jobs failed; the message names them, their logs, and the jobs not run because of it."""


def run_jobs(
    jobs: Sequence[Job],
    *,
    slots: int | None = None,
    title: str = "jobs",
    preload: Sequence[str] = PRELOAD,
) -> dict[str, JobResult]:
    """Run every job that has not finished before; returns name -> result when all have.

    Each runs in a process forked from one that has imported `preload` and the jobs' modules, so
    its start costs nothing. They start in the order given as soon as what they need is there, in
    at most `slots` threads together (default: the CPU cores that this process may use).

    Raises `ValueError` for a graph that cannot be run, `DirectoryBusy` when another runner has one
    of the directories, and `JobsFailed` at the end if a job failed; jobs that do not depend on it
    are finished first. SIGINT, SIGTERM and SIGHUP end the jobs, then the program.
    """
    prints = fingerprints(jobs)
    with ExitStack() as stack:
        locks = {}
        for job in jobs:
            locks[job.name] = Lock.take(job.directory)
            stack.callback(locks[job.name].release)
        display = open_display(title, len(jobs))
        stack.callback(display.close)
        run = _Run(jobs, prints, locks, slots or joblib.cpu_count(), display)
        run.reuse_finished()
        stack.enter_context(_orderly_end(run))
        if run.waiting:
            _start_forkserver([*preload, *(job.function.__module__ for job in run.waiting)])
        run.loop()
    run.raise_failures()
    return {job.name: run.results[job.name] for job in jobs}


@dataclass
class _Running:
    job: Job
    process: ForkServerProcess
    channel: Connection
    started: float


class _Run:
    """The state of one call of `run_jobs`."""

    def __init__(
        self,
        jobs: Sequence[Job],
        prints: dict[str, str],
        locks: dict[str, Lock],
        slots: int,
        display: Display,
    ) -> None:
        self.waiting = list(jobs)
        self.running: list[_Running] = []
        self.results: dict[str, JobResult] = {}
        self.failed: dict[str, str] = {}
        self.not_run: dict[str, str] = {}
        self.stop_signal: int | None = None
        self.hurry = False
        self.total = len(jobs)
        self.prints = prints
        self.locks = locks
        self.slots = slots
        self.display = display

    def reuse_finished(self) -> None:
        for job in list(self.waiting):
            record = read_record(job.directory)
            if record and (record.fingerprint, record.status) == (
                self.prints[job.name],
                "finished",
            ):
                self.waiting.remove(job)
                self.results[job.name] = JobResult(record.seconds, True, job.directory)
                self.display.end(job.name, f"reused, it took {record.seconds:.1f} s")
            else:
                refuse_foreign(job.directory)

    def loop(self) -> None:
        while self.waiting or self.running:
            if self.stop_signal:
                raise SystemExit(128 + self.stop_signal)
            self._start_ready()
            sentinels = [item.process.sentinel for item in self.running]
            channels = [item.channel for item in self.running]
            connection.wait([*sentinels, *channels], timeout=_TICK)
            for item in list(self.running):
                self._listen(item)
                if item.process.exitcode is not None:
                    self._close(item)
            self.display.refresh()
            # A runner inside a job lets its own runner know.
            progress(len(self.results), self.total, ", ".join(r.job.name for r in self.running))

    def _start_ready(self) -> None:
        free = self.slots - sum(min(item.job.threads, self.slots) for item in self.running)
        for job in list(self.waiting):
            blocker = next((n for n in job.needs if n in self.failed or n in self.not_run), None)
            if blocker is not None:
                self.waiting.remove(job)
                self.not_run[job.name] = blocker
                self.display.end(job.name, f"not run, it needs {blocker}")
            elif all(need in self.results for need in job.needs):
                threads = min(job.threads, self.slots)
                if threads > free:
                    break  # a later, smaller job must not overtake this one for ever
                free -= threads
                self.waiting.remove(job)
                self._start(job, threads)

    def _start(self, job: Job, threads: int) -> None:
        prepare(job.directory, self.prints[job.name])
        receiver, sender = multiprocessing.Pipe(duplex=False)
        task = Task(
            pickle.dumps((job.function, dict(job.kwargs))),
            job.directory,
            threads,
            self.prints[job.name],
            sender,
            self.locks[job.name],
        )
        process = multiprocessing.get_context("forkserver").Process(
            target=work, args=(task,), name=job.name
        )
        process.start()
        sender.close()
        self.running.append(_Running(job, process, receiver, time.monotonic()))
        self.display.start(job.name)

    def _listen(self, item: _Running) -> None:
        with suppress(EOFError, OSError):
            while item.channel.poll():
                self.display.report(item.job.name, *item.channel.recv())

    def _close(self, item: _Running) -> None:
        """Take in the end of a job's process."""
        self.running.remove(item)
        item.channel.close()
        name, out = item.job.name, item.job.directory
        record = read_record(out)
        if item.process.exitcode == 0 and record and record.status == "finished":
            self.results[name] = JobResult(record.seconds, False, out)
            self.display.end(name, f"{record.seconds:.1f} s")
            return
        _signal_group(item.process, signal.SIGKILL)  # what the job itself may have started
        self.failed[name] = f"{_explain_exit(item.process.exitcode)}, log: {out / LOG}"
        self.display.end(name, f"FAILED after {time.monotonic() - item.started:.1f} s")
        self.display.say(_tail(out / LOG))

    def end_all(self) -> None:
        """End every running job: politely, then surely, and at once when asked a second time."""
        for item in self.running:
            _signal_group(item.process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for item in self.running:
            while item.process.is_alive() and time.monotonic() < deadline and not self.hurry:
                item.process.join(_TICK)
            _signal_group(item.process, signal.SIGKILL)
            item.process.join()

    def say_stopped(self) -> None:
        self.display.say(
            f"stopped: {len(self.results)} of {self.total} jobs have finished and are kept. "
            "Give the same command again to continue."
        )

    def raise_failures(self) -> None:
        if self.failed:
            lines = [f"job `{name}` failed: {how}" for name, how in self.failed.items()]
            lines += [f"job `{n}` was not run: it needs `{b}`" for n, b in self.not_run.items()]
            raise JobsFailed("\n".join(lines))


def _start_forkserver(preload: Sequence[str]) -> None:
    """Start the process that jobs are forked from, unless this process has one already."""
    # "__main__" is left out: multiprocessing imports it in every process anyway.
    modules = dict.fromkeys(name for name in [work.__module__, *preload] if name[:2] != "__")
    multiprocessing.set_forkserver_preload(list(modules))
    # OpenBLAS and OpenMP fix their default number of threads when they are loaded, which happens
    # there; the forkserver takes over this process's environment and has no argument for it.
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    forkserver.ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@contextmanager
def _orderly_end(run: _Run) -> Iterator[None]:
    """Leave no job behind, however the block ends; signals that ask to stop end it at a safe spot.

    The handler only takes note, so that no process is lost between its start and its entry in
    `run.running`; the loop looks several times a second.
    """

    def note(number: int, frame: FrameType | None) -> None:
        run.hurry = run.stop_signal is not None
        run.stop_signal = number

    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            with suppress(ValueError):  # not the main thread, which alone hears signals
                handlers[number] = signal.signal(number, note)
    try:
        yield
    except SystemExit:
        run.say_stopped()
        raise
    finally:
        run.end_all()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _signal_group(process: ForkServerProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # it is gone, or has not yet become the leader of a group
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _explain_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"ended by {signal.Signals(-code).name}"


def _tail(log: Path) -> str:
    with suppress(FileNotFoundError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"the end of {log}:", *(f"  {line}" for line in lines[-_TAIL:])])
    return f"{log}: the job wrote nothing."
