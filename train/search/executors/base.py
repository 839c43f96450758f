"""What a search asks of the place where its jobs run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from train.jobs import Job, JobFailure, JobResult, OnEnd

__all__ = ["Executor", "Job", "JobFailure", "JobResult", "OnEnd"]


class Executor(Protocol):
    """Runs graphs of jobs, any number of them one after the other, until it is closed."""

    def run(
        self, jobs: Sequence[Job], title: str, on_end: OnEnd | None = None
    ) -> dict[str, JobResult | JobFailure]:
        """Job name -> how it ended. A failed job stops only those that need it.

        `on_end` is called in this process as soon as a job has ended, or will not run: with
        what the result then holds under its name.

        A job that finished before, here or under another executor, is not run again. One whose
        process was ended by a signal or was lost with its node is tried again, in the same
        directory. Progress is shown under `title`.

        Raises `ValueError` for a graph that cannot be run or that asks for more than there is,
        `DirectoryBusy` when another runner has one of the directories. SIGINT, SIGTERM and SIGHUP
        end the jobs, then the program.
        """

    def close(self) -> None:
        """Give back what is held between two runs. No process of a job is left."""
