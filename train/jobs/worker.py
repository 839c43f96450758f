"""The process of one job: it works, says how far it is, and writes its record."""

from __future__ import annotations

import ctypes
import faulthandler
import io
import json
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from train.jobs.directory import LOG, Record, write_record

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
MARK = "EAGLE_MOE_JOB"
"""Environment variable of a job and of every program that it starts: where its keeper listens."""
_REPORT_EVERY = 0.2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_last_report = 0.0


def progress(done: float, total: float, note: str = "") -> None:
    """Say, from inside a job, that `done` of `total` is done; `note` is shown beside the bar.

    Cheap enough to call at every step. Outside a job it does nothing. Of processes that a launcher
    has started together, only the first one is heard.
    """
    global _last_report
    address = os.environ.get(MARK)
    now = time.monotonic()
    if not address or os.environ.get("RANK", "0") != "0":
        return
    if now - _last_report < _REPORT_EVERY and done < total:
        return
    _last_report = now
    message = json.dumps([done, total, note]).encode()
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)  # a report may be lost, a job must not wait
        sender.sendto(message, socket_name(address))


def socket_name(address: str) -> str:
    """`@name`, as an environment can hold it, is a name that needs no file (Linux, unix(7))."""
    return "\0" + address[1:] if address.startswith("@") else address


@dataclass(frozen=True)
class Task:
    """What a keeper needs to run a job.

    - `call`: the pickled (function, kwargs).
    - `mark`: see `MARK`.
    - `devices`: of its GPUs, as CUDA_VISIBLE_DEVICES names them. None: the variable stays.
    - `lease`: seconds after which a keeper that hears nothing takes its owner for gone.
    """

    name: str
    call: bytes
    out: Path
    threads: int
    fingerprint: str
    mark: str
    devices: tuple[str, ...] | None = None
    lease: float = float("inf")


class Closable(Protocol):
    def close(self) -> None: ...


def work(task: Task, keeper: int, not_ours: Sequence[Closable]) -> None:
    """Run the task and write its record. An exception ends up in the log and in the exit code.

    `keeper`: process that this one must not outlive. `not_ours`: its ends of its connections.
    """
    started = time.monotonic()
    os.setsid()
    end_with_parent()
    if os.getppid() != keeper:  # it went before the kernel was told
        os._exit(1)
    for end in not_ours:
        end.close()
    _write_to(task.out / LOG)
    _limit_threads(task.threads)
    os.environ[MARK] = task.mark
    if task.devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(task.devices)
    # Unpickled here, not by multiprocessing: a failing import then shows in the job's own log.
    function, kwargs = pickle.loads(task.call)
    function(out=task.out, **kwargs)
    seconds = round(time.monotonic() - started, 3)
    write_record(task.out, Record(task.fingerprint, "finished", seconds))


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; on Linux, else nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


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
