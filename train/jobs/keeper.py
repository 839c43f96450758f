"""The process that keeps a job: it starts it, watches it, and leaves when nothing of it is left.

    runner ------------ keeper ------------ job ------------ what the job starts
            orders, EOF          SIGKILL,         (torchrun and its ranks, loaders, ...;
                                 PDEATHSIG         they may have sessions of their own)

A job may be busy in a library or be killed, so it cannot see to this itself. The keeper does
nothing else. The kernel gives it every process of the job whose parent has ended, so that none
escapes; it ends them all when it is told to or when its owner is gone, even by SIGKILL.

Elsewhere than below the runner it is a program, `COMMAND`.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from train.jobs.directory import Lock
from train.jobs.place import Ending, Progress
from train.jobs.worker import MARK, Task, socket_name, work

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_LAST_WORDS = 1.0
"""Seconds for what a job leaves behind to end by itself, such as Python's resource tracker."""
_TICK = 0.05

COMMAND = (sys.executable, "-c", "from train.jobs.keeper import main; main()")
"""Of a keeper; then comes the descriptor of its connection, through which it gets the modules' path
and the `Task`. It detaches itself from its parent."""
BEAT = 0
"""The order that says nothing but that the owner is there; other orders are signals."""


def new_mark() -> str:
    """A name for a job's processes that is nobody else's; see `train.jobs.worker.MARK`."""
    name = f"eagle-moe-{uuid.uuid4().hex}"
    return f"@{name}" if sys.platform == "linux" else str(Path(tempfile.gettempdir(), name))


def keep(task: Task, owner: Connection, lock: Lock | None = None) -> None:
    """Run `task`, tell `owner` of it, and return when no process of it is left.

    `owner` gets the job's session (an int), its progress (`train.jobs.place.Progress`), and at last
    its `Ending`. `lock` is held until then.
    """
    with suppress(PermissionError):  # it leads a session already
        os.setsid()  # Ctrl-C in a terminal reaches the runner alone, which ends the jobs in order
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(socket_name(task.mark))
        inbox.setblocking(False)
        job = multiprocessing.get_context("fork").Process(
            target=work, args=(task, os.getpid(), (owner, inbox)), name=task.name
        )
        job.start()
        code = _Watch(task, job, owner, inbox).until_nothing_is_left()
    if not task.mark.startswith("@"):
        Path(task.mark).unlink()
    with suppress(OSError):
        owner.send(Ending(code))


class _Watch:
    """The state of one call of `keep`."""

    def __init__(
        self, task: Task, job: ForkProcess, owner: Connection, inbox: socket.socket
    ) -> None:
        self.lease = task.lease
        self.job = job
        self.owner = owner
        self.inbox = inbox
        self.heard = time.monotonic()
        self.asked_to_end = False
        self.killing = False

    def until_nothing_is_left(self) -> int:
        """Exit code of the job."""
        self._tell(self.job.pid)
        while self.job.exitcode is None:
            self._listen([self.job.sentinel], 1.0)
            if self.killing:
                _signal_session(self.job, signal.SIGKILL)
                self.job.join()
        code = self.job.exitcode
        # What was asked to end may still be saving: then the owner says when it has been enough.
        deadline = float("inf") if self.asked_to_end else time.monotonic() + _LAST_WORDS
        while not _reaped():
            if self.killing or time.monotonic() > deadline:
                for process in psutil.Process().children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            self._listen([], _TICK)
        self._hand_on()
        return code

    def _listen(self, others: list[Any], seconds: float) -> None:
        ends = [self.inbox, *others] if self.killing else [self.inbox, self.owner, *others]
        ready = connection.wait(ends, min(seconds, self.lease))
        if self.owner in ready:
            self.heard = time.monotonic()
            self._obey()
        elif time.monotonic() - self.heard > self.lease:
            self.killing = True
        if self.inbox in ready:
            self._hand_on()

    def _obey(self) -> None:
        try:
            order = self.owner.recv()
        except (EOFError, OSError):
            order = signal.SIGKILL
        if order == signal.SIGKILL:
            self.killing = True
        elif order != BEAT:
            self.asked_to_end = True
            _signal_session(self.job, order)

    def _hand_on(self) -> None:
        """Progress, to the owner. Anybody can write to the inbox: what is no progress is let be."""
        with suppress(BlockingIOError):
            while True:
                with suppress(ValueError):
                    done, total, note = json.loads(self.inbox.recv(65536))
                    self._tell((float(done), float(total), str(note)))

    def _tell(self, message: Any) -> None:
        with suppress(OSError):  # the owner is gone, which `_obey` will notice
            self.owner.send(message)


def _reaped() -> bool:
    """Whether this process has no children left; takes note of those that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def _signal_session(job: ForkProcess, number: signal.Signals) -> None:
    assert job.pid is not None
    try:
        os.killpg(job.pid, number)
    except ProcessLookupError:  # it is gone, or has not yet become the leader of a group
        with suppress(ProcessLookupError):
            os.kill(job.pid, number)


class Kept:
    """A keeper as its owner sees it, through its end of their connection."""

    def __init__(self, channel: Connection, mark: str) -> None:
        self.channel = channel
        self.session: int | None = None
        self.ending: Ending | None = None
        self._mark = mark

    def listen(self) -> Iterator[Progress]:
        """What has come since the last call. Brings `ending` up to date."""
        try:
            while self.ending is None and self.channel.poll():
                message = self.channel.recv()
                if isinstance(message, Ending):
                    self.ending = message
                elif isinstance(message, int):
                    self.session = message
                else:
                    yield message
        except (EOFError, OSError):
            end_marked(self._mark, self.session)
            self.ending = Ending(None, "the process that keeps it was killed")

    def order(self, order: int) -> None:
        """A signal, or `BEAT`."""
        with suppress(OSError):  # the keeper is gone, which `listen` will notice
            self.channel.send(order)


def end_marked(mark: str, session: int | None) -> None:
    """Kill what is left on this machine of a job whose keeper was killed; return when it is gone.

    It is known by its environment, which programs inherit, or by its session, which forks do.
    """
    while left := [process for process in psutil.process_iter() if _is_of(process, mark, session)]:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(_TICK)


def _is_of(process: psutil.Process, mark: str, session: int | None) -> bool:
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        if session is not None and os.getsid(process.pid) == session:
            return True
        return process.environ().get(MARK) == mark
    except (psutil.Error, OSError):  # another user's, or it has ended meanwhile
        return False


def main() -> None:
    """Keep the task that comes through the descriptor that is the last argument.

    Goes on as nobody's child: a process of Ray's that ends kills its children first, and killed, a
    keeper could end nothing.
    """
    if os.fork():
        os._exit(0)
    owner: Connection = Connection(int(sys.argv[-1]))
    path, task = owner.recv()
    sys.path.extend(entry for entry in path if entry not in sys.path)
    keep(task, owner)
