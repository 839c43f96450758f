"""What a cluster runs on the machine that has room for a job: the owner of the job's keeper.

A process of Ray's imports this, so it imports nothing that is heavy.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path

from train.jobs.directory import LOCK, read_record
from train.jobs.keeper import BEAT, COMMAND, Kept, end_marked
from train.jobs.place import Ending, Progress
from train.jobs.worker import Task

BREATH = 1.0
"""Seconds for which `Host.poll` waits for news; a keeper hears from its owner so often."""
VISIBLE = 60.0
"""Seconds in which a file that one node has written is seen by the others: what NFS keeps in its
caches is older than that in no default (nfs(5), acdirmax)."""


class Host:
    """An actor with room for one job. If its process dies, the keeper ends the job."""

    def __init__(self) -> None:
        self._kept: Kept | None = None
        self._progress: Progress | None = None

    def start(self, folder: str, path: Sequence[str], task: Task) -> str:
        """Start `task` in `folder` with the modules of `path`; returns where it runs.

        Raises `ValueError` if this node does not see the job's directory.
        """
        import ray

        os.chdir(folder)
        _await_directory(task)
        if task.devices is not None:
            ids = ray.get_runtime_context().get_accelerator_ids()["GPU"]
            task = replace(task, devices=tuple(ids))
        ours, keepers = multiprocessing.Pipe()
        subprocess.run([*COMMAND, str(keepers.fileno())], pass_fds=[keepers.fileno()], check=True)
        keepers.close()
        self._kept = Kept(ours, task.mark)
        ours.send((list(path), task))
        return f" GPU {','.join(task.devices)}" if task.devices else ""

    def poll(self) -> tuple[int | None, Progress | None, Ending | None]:
        """The job's session, its latest progress and its ending; waits a little for news.

        An answer may be lost on its way: asked again, it says the same.
        """
        assert self._kept is not None
        if self._kept.ending is None:
            self._kept.order(BEAT)
            connection.wait([self._kept.channel], BREATH)
            for progress in self._kept.listen():
                self._progress = progress
        else:
            time.sleep(BREATH)
        return self._kept.session, self._progress, self._kept.ending

    def signal(self, number: signal.Signals) -> None:
        assert self._kept is not None
        self._kept.order(number)


def _await_directory(task: Task) -> None:
    deadline = time.monotonic() + VISIBLE
    while (record := read_record(task.out)) is None or record.fingerprint != task.fingerprint:
        if time.monotonic() > deadline:
            raise ValueError(f"{task.out.absolute()} is not seen here as the driver has written it")
        time.sleep(0.5)


def sweep(mark: str, session: int | None) -> None:
    """Return when no process of a job is left on this node."""
    end_marked(mark, session)


def look_around(folder: str, tokens: dict[str, str], locked: str) -> tuple[str, bool]:
    """What is wrong with this node ("" = nothing), and whether it sees the driver's locks.

    - `folder`: the driver's working directory, which holds this code.
    - `tokens`: files that the driver has written -> what is in them.
    - `locked`: a job's directory that the driver has locked.
    """
    if not Path(folder, "train", "search").is_dir():
        return f"has no checkout in {folder}, where the driver works", True
    os.chdir(folder)
    deadline = time.monotonic() + VISIBLE
    for name, text in tokens.items():
        while not _holds(Path(name), text):
            if time.monotonic() > deadline:
                return (
                    f"does not see what the driver writes to {Path(name).parent.absolute()}",
                    True,
                )
            time.sleep(0.5)
        if not os.access(Path(name).parent, os.W_OK):
            return f"cannot write to {Path(name).parent.absolute()}", True
    return "", _is_locked(Path(locked, LOCK))


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == text
    except OSError:
        return False


def _is_locked(file: Path) -> bool:
    with file.open("rb+") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False
