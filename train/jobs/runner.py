"""The runner: starts what is ready, listens, keeps order when something fails or it is stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from train.jobs.directory import LOG, Lock, prepare, read_record, refuse_foreign
from train.jobs.display import Display, open_display
from train.jobs.graph import Job, fingerprints
from train.jobs.local import PRELOAD, LocalPlace
from train.jobs.place import Attempt, Ending, Place
from train.jobs.worker import progress

GRACE = 25.0
"""Seconds that a job has between SIGTERM and SIGKILL when the run is stopped, so that training can
save a step: less than the 30 that schedulers commonly give."""
PATIENCE = 60.0
"""Seconds without room for any job after which, and after each of which, the person is told."""
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
    """Why a job did not finish, and the log that says more.

    A job that was not run because of another has the log of that one.
    """

    name: str
    how: str
    log: Path


OnEnd = Callable[[str, JobResult | JobFailure], None]


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

    Each runs on this machine, in a process forked from one that has imported `preload` and the
    jobs' modules, so its start costs nothing. They start in the order given as soon as what they
    need is there, in at most `slots` threads together (default: the CPU cores that this process may
    use).

    Raises `ValueError` for a graph that cannot be run, `DirectoryBusy` when another runner has one
    of the directories, and `JobsFailed` at the end if a job failed; jobs that do not depend on it
    are finished first. SIGINT, SIGTERM and SIGHUP end the jobs, then the program.
    """
    results: dict[str, JobResult] = {}
    failures = []
    for name, how in try_jobs(jobs, LocalPlace(slots, preload=preload), title=title).items():
        if isinstance(how, JobResult):
            results[name] = how
        else:
            failures.append(f"job `{name}`: {how.how}, log: {how.log}")
    if failures:
        raise JobsFailed("\n".join(failures))
    return results


def try_jobs(
    jobs: Sequence[Job],
    place: Place,
    *,
    title: str = "jobs",
    retries: int = 0,
    grace: float = GRACE,
    on_end: OnEnd | None = None,
) -> dict[str, JobResult | JobFailure]:
    """As `run_jobs`, at any place; a job that fails is in what is returned.

    `retries`: how often a job is tried again, in the same directory, that did not fail by itself:
    ended by a signal, lost with its machine, or of the status EX_TEMPFAIL. `grace`: seconds
    between SIGTERM and SIGKILL when the run is stopped.
    `on_end(name, how)`: called here as soon as it is known how a job has ended.
    """
    prints = fingerprints(jobs)
    place.check(jobs)
    with ExitStack() as stack:
        locks = {}
        for job in jobs:
            locks[job.name] = Lock.take(job.directory)
            stack.callback(locks[job.name].release)
        display = open_display(title, len(jobs))
        stack.callback(display.close)
        run = _Run(jobs, prints, locks, place, retries, grace, display, on_end)
        run.reuse_finished()
        stack.callback(place.close)
        place.open(run.waiting, display.say)
        stack.enter_context(_orderly_end(run))
        run.loop()
    return {job.name: run.done[job.name] for job in jobs}


@dataclass
class _Running:
    job: Job
    attempt: Attempt
    started: float


class _Run:
    """The state of one call of `try_jobs`."""

    def __init__(
        self,
        jobs: Sequence[Job],
        prints: dict[str, str],
        locks: dict[str, Lock],
        place: Place,
        retries: int,
        grace: float,
        display: Display,
        on_end: OnEnd | None,
    ) -> None:
        self.waiting = list(jobs)
        self.running: list[_Running] = []
        self.done: dict[str, JobResult | JobFailure] = {}
        self.attempts = dict.fromkeys(prints, 0)
        self.stop_signal: int | None = None
        self.hurry = False
        self.idle_since = time.monotonic()
        self.total = len(jobs)
        self.prints = prints
        self.locks = locks
        self.place = place
        self.retries = retries
        self.grace = grace
        self.display = display
        self.on_end = on_end

    @property
    def finished(self) -> int:
        return sum(isinstance(how, JobResult) for how in self.done.values())

    def reuse_finished(self) -> None:
        for job in list(self.waiting):
            if (result := self._result(job, reused=True)) is not None:
                self.waiting.remove(job)
                self._ended(job, result, f"reused, it took {result.seconds:.1f} s")
            else:
                refuse_foreign(job.directory)

    def _result(self, job: Job, reused: bool) -> JobResult | None:
        record = read_record(job.directory)
        if record is None or record.fingerprint != self.prints[job.name]:
            return None
        if record.status != "finished":
            return None
        return JobResult(record.seconds, reused, job.directory)

    def loop(self) -> None:
        while self.waiting or self.running:
            if self.stop_signal:
                raise SystemExit(128 + self.stop_signal)
            self._start_ready()
            self._listen()
            self._say_if_stuck()
            self.display.refresh()
            # A runner inside a job lets its own runner know.
            progress(self.finished, self.total, ", ".join(r.job.name for r in self.running))

    def _start_ready(self) -> None:
        ready = []
        for job in list(self.waiting):
            blocker = next((n for n in job.needs if isinstance(self.done.get(n), JobFailure)), None)
            if blocker is not None:
                self._give_up(job, blocker)
            elif all(need in self.done for need in job.needs):
                ready.append(job)
        for job in self.place.admit(ready):
            self.waiting.remove(job)
            self._start(job)

    def _give_up(self, job: Job, blocker: str) -> None:
        cause = self.done[blocker]
        assert isinstance(cause, JobFailure)
        self.waiting.remove(job)
        how = f"not run, it needs `{blocker}`"
        self._ended(job, JobFailure(job.name, how, cause.log), f"not run, it needs {blocker}")

    def _ended(self, job: Job, how: JobResult | JobFailure, told: str) -> None:
        self.done[job.name] = how
        self.display.end(job.name, told)
        if self.on_end is not None:
            self.on_end(job.name, how)

    def _start(self, job: Job) -> None:
        prepare(job.directory, self.prints[job.name])
        self.attempts[job.name] += 1
        attempt = self.place.start(job, self.prints[job.name], self.locks[job.name])
        self.running.append(_Running(job, attempt, time.monotonic()))
        self.display.start(job.name, attempt.where)

    def _listen(self) -> None:
        self.place.wait(_TICK)
        for item in list(self.running):
            for done, total, note in item.attempt.listen():
                notes = ", ".join(filter(None, (item.attempt.where, note)))
                self.display.report(item.job.name, done, total, notes)
            if item.attempt.ending is not None:
                self._close(item, item.attempt.ending)

    def _close(self, item: _Running, ending: Ending) -> None:
        """Take in the end of a job."""
        self.running.remove(item)
        item.attempt.close()
        job, log = item.job, item.job.directory / LOG
        if ending.code == 0 and (result := self._result(job, reused=False)) is not None:
            where = f" ({item.attempt.where})" if item.attempt.where else ""
            self._ended(job, result, f"{result.seconds:.1f} s{where}")
        elif ending.foreign and self.attempts[job.name] <= self.retries and not self.stop_signal:
            self.waiting.insert(0, job)
            again = f"attempt {self.attempts[job.name] + 1} of {self.retries + 1} follows"
            self.display.again(job.name, f"{ending}; {again}")
        else:
            count = self.attempts[job.name]
            how = f"failed, {ending}" + (f" (attempt {count})" if count > 1 else "")
            told = f"FAILED after {time.monotonic() - item.started:.1f} s, {ending}"
            self._ended(job, JobFailure(job.name, how, log), told)
            self.display.say(_tail(log))

    def _say_if_stuck(self) -> None:
        now = time.monotonic()
        if self.running:
            self.idle_since = now
        elif self.waiting and now - self.idle_since > PATIENCE:
            self.idle_since = now
            self.display.say(f"no room for {self.waiting[0].name}: {self.place.room()}")

    def end_all(self) -> None:
        """End every running job: politely, then surely, and at once when asked a second time."""
        for item in self.running:
            item.attempt.signal(signal.SIGTERM)
        deadline = time.monotonic() + self.grace
        while self._ending() and time.monotonic() < deadline and not self.hurry:
            self.place.wait(_TICK)
        for attempt in self._ending():
            attempt.signal(signal.SIGKILL)
        while self._ending():
            self.place.wait(_TICK)
        for item in self.running:
            item.attempt.close()

    def _ending(self) -> list[Attempt]:
        """Those that have not ended yet."""
        for item in self.running:
            for _ in item.attempt.listen():
                pass  # what it says now is of no interest
        return [item.attempt for item in self.running if item.attempt.ending is None]

    def say_stopped(self) -> None:
        self.display.say(
            f"stopped: {self.finished} of {self.total} jobs have finished and are kept. "
            "Give the same command again to continue."
        )


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


def _tail(log: Path) -> str:
    with suppress(FileNotFoundError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"the end of {log}:", *(f"  {line}" for line in lines[-_TAIL:])])
    return f"{log}: the job wrote nothing."
