"""The process of one job: it ties its life to the runner, works, and writes its record."""

from __future__ import annotations

import ctypes
import faulthandler
import io
import os
import pickle
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from pathlib import Path

from train.jobs.directory import LOG, Lock, Record, write_record

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_REPORT_EVERY = 0.2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_channel: Connection | None = None
_last_report = 0.0


def progress(done: float, total: float, note: str = "") -> None:
    """Say, from inside a job, that `done` of `total` is done; `note` is shown beside the bar.

    Cheap enough to call at every step. Outside a job it does nothing.
    """
    global _last_report
    now = time.monotonic()
    if _channel is None or (now - _last_report < _REPORT_EVERY and done < total):
        return
    _last_report = now
    with suppress(OSError):  # the runner is gone, and so will this process be in a moment
        _channel.send((done, total, note))


@dataclass(frozen=True)
class Task:
    """What the runner sends to a job's process. `call` is the pickled (function, kwargs)."""

    call: bytes
    out: Path
    threads: int
    fingerprint: str
    channel: Connection
    lock: Lock


def work(task: Task) -> None:
    """Run the task and write its record. An exception ends up in the log and in the exit code."""
    global _channel
    started = time.monotonic()  # here, because the first process waits for the forkserver's imports
    os.setsid()  # Ctrl-C in a terminal reaches the runner alone, which ends the jobs in order
    _end_with_runner()
    _write_to(task.out / LOG)
    _limit_threads(task.threads)
    _channel = task.channel
    # Unpickled here, not by multiprocessing: a failing import then shows in the job's own log.
    function, kwargs = pickle.loads(task.call)
    function(out=task.out, **kwargs)
    seconds = round(time.monotonic() - started, 3)
    write_record(task.out, Record(task.fingerprint, "finished", seconds))


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; on Linux, else nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_runner() -> None:
    """Make sure that neither this process nor its children outlive the runner, even on SIGKILL."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="runner-watch", daemon=True).start()
    # The parent in the kernel's sense is the forkserver. Without it the runner cannot learn how
    # this process ends and would take it for failed while it still writes.
    end_with_parent()


def _write_to(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", line_buffering=True)
    faulthandler.enable()


def _limit_threads(threads: int) -> None:
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    if "torch" in sys.modules:  # it was preloaded, and has read the environment before
        sys.modules["torch"].set_num_threads(threads)
