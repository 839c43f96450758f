"""This machine as a place for jobs: processes forked from one that has imported the libraries."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess

from train.jobs.directory import Lock
from train.jobs.graph import Job
from train.jobs.keeper import Kept, keep, new_mark
from train.jobs.place import Ending, Progress
from train.jobs.worker import THREAD_VARIABLES, Task

PRELOAD = ("torch", "transformers", "transformers.modeling_utils")
"""Imported once, by the process that all jobs are forked from."""

_FOR_FORKS = {
    # OpenBLAS and OpenMP fix their default number of threads when they are loaded.
    **dict.fromkeys(THREAD_VARIABLES, "1"),
    # A library that only asks whether there is a GPU must not start CUDA: no fork could use it.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


class LocalPlace:
    """Slots for compute threads, and GPUs that are handed out to one job each.

    - `slots`: default: the CPU cores that this process may use. A job that asks for more threads
      than there are slots gets all of them.
    - `gpus`: how many to hand out, from 0 on. Default: those that this process sees.
    - `preload`: modules that are imported before the first fork, besides those of the jobs.
    """

    def __init__(
        self,
        slots: int | None = None,
        gpus: int | None = None,
        preload: Sequence[str] = PRELOAD,
    ) -> None:
        from joblib import cpu_count  # slow to import, and keepers elsewhere do without

        self.slots = slots or cpu_count()
        self._gpus = gpus
        self._preload = preload
        self._free = self.slots
        self._taken: set[str] = set()
        self._running: list[LocalAttempt] = []

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """The GPUs, as CUDA_VISIBLE_DEVICES names them."""
        return visible_devices() if self._gpus is None else tuple(map(str, range(self._gpus)))

    def check(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.gpus and job.gpus > len(self.devices):
                raise ValueError(
                    f"job `{job.name}` asks for {job.gpus} GPUs, but there are "
                    f"{len(self.devices)} here. Give it fewer, or free more for this program "
                    "(CUDA_VISIBLE_DEVICES)."
                )

    def open(self, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
        if jobs:
            _start_forkserver([*self._preload, *(job.function.__module__ for job in jobs)])

    def admit(self, ready: Sequence[Job]) -> list[Job]:
        admitted = []
        threads = self._free
        gpus = self._free_gpus() if any(job.gpus for job in ready) else 0
        for job in ready:
            # Room is set aside in this order: small jobs must not overtake a big one for ever.
            threads -= self._threads(job)
            gpus -= job.gpus or 0
            if threads >= 0 and (gpus >= 0 or not job.gpus):
                admitted.append(job)
        return admitted

    def _threads(self, job: Job) -> int:
        return min(job.threads, self.slots)

    def _free_gpus(self) -> int:
        return len(self.devices) - len(self._taken)

    def start(self, job: Job, fingerprint: str, lock: Lock) -> LocalAttempt:
        devices = None
        if job.gpus is not None:
            free = [each for each in self.devices if each not in self._taken] if job.gpus else []
            devices = tuple(free[: job.gpus])
        threads = self._threads(job)
        task = Task(
            job.name,
            pickle.dumps((job.function, dict(job.kwargs))),
            job.directory,
            threads,
            fingerprint,
            new_mark(),
            devices,
        )
        self._free -= threads
        self._taken.update(devices or ())
        attempt = LocalAttempt(task, lock, self._take_back)
        self._running.append(attempt)
        return attempt

    def _take_back(self, attempt: LocalAttempt) -> None:
        self._running.remove(attempt)
        self._free += attempt.task.threads
        self._taken.difference_update(attempt.task.devices or ())

    def wait(self, seconds: float) -> None:
        channels = [each.kept.channel for each in self._running if each.ending is None]
        if channels:
            connection.wait(channels, seconds)
        else:
            time.sleep(seconds)

    def room(self) -> str:
        return f"{self._free} of {self.slots} slots are free"

    def close(self) -> None:
        """The process that jobs are forked from stays for the next ones."""


class LocalAttempt:
    """A keeper below this process, and the job below it."""

    def __init__(self, task: Task, lock: Lock, closed: Callable[[LocalAttempt], None]) -> None:
        self.task = task
        self.where = f"GPU {','.join(task.devices)}" if task.devices else ""
        self._closed = closed
        ours, keepers = multiprocessing.Pipe()
        self._process: ForkServerProcess = multiprocessing.get_context("forkserver").Process(
            target=keep, args=(task, keepers, lock), name=task.name
        )
        self._process.start()
        keepers.close()
        self.kept = Kept(ours, task.mark)

    @property
    def ending(self) -> Ending | None:
        return self.kept.ending

    def listen(self) -> Iterator[Progress]:
        return self.kept.listen()

    def signal(self, number: signal.Signals) -> None:
        self.kept.order(number)

    def close(self) -> None:
        self._process.join()
        self.kept.channel.close()
        self._closed(self)


def visible_devices() -> tuple[str, ...]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; CUDA is not started."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        names = [name.strip() for name in told.split(",")]
        # as CUDA reads it: up to the first that is none
        ends = [at for at, name in enumerate(names) if name in ("", "-1")]
        return tuple(names[: ends[0]] if ends else names)
    import torch

    return tuple(map(str, range(torch.cuda.device_count())))


def _start_forkserver(preload: Sequence[str]) -> None:
    """Start the process that jobs are forked from, unless this process has one already."""
    # "__main__" is left out: multiprocessing imports it in every process anyway.
    modules = dict.fromkeys(name for name in [keep.__module__, *preload] if name[:2] != "__")
    multiprocessing.set_forkserver_preload(list(modules))
    # It takes over this process's environment; there is no argument for it.
    before = {name: os.environ.get(name) for name in _FOR_FORKS}
    os.environ.update(_FOR_FORKS)
    forkserver.ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
