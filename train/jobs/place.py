"""What the runner asks of the place where jobs run: this machine, or a cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from train.jobs.directory import Lock
from train.jobs.graph import Job

Progress = tuple[float, float, str]
"""How much is done, of how much, and a note."""


@dataclass(frozen=True)
class Ending:
    """How an attempt at a job ended.

    - `code`: exit status of its process, or minus the signal that ended it; None if it was lost.
    - `loss`: how it was lost.
    """

    code: int | None
    loss: str = ""

    @property
    def foreign(self) -> bool:
        """Whether something from outside has ended it, so that another attempt may go well.

        A program says so itself by the status EX_TEMPFAIL of sysexits.h.
        """
        return self.code is None or self.code < 0 or self.code == os.EX_TEMPFAIL

    def __str__(self) -> str:
        if self.code is None:
            return f"lost: {self.loss}"
        if self.code < 0:
            return f"ended by {signal.Signals(-self.code).name}"
        return f"exit code {self.code}"


class Attempt(Protocol):
    """A job that was started. Its processes are gone when `ending` is there."""

    @property
    def where(self) -> str:
        """What a person should know of the place: its node, its GPUs. May be empty."""

    @property
    def ending(self) -> Ending | None: ...

    def listen(self) -> Iterator[Progress]:
        """What was said since the last call. Brings `ending` up to date."""

    def signal(self, number: signal.Signals) -> None:
        """Send it to the job. SIGKILL ends every process that it has started as well."""

    def close(self) -> None:
        """Give back what the attempt has held. No process of it is left."""


class Place(Protocol):
    """Has room for some jobs at a time."""

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise `ValueError` naming a job for which there will never be room."""

    def open(self, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
        """Get ready for `jobs`, which are locked; `say` tells the person something."""

    def admit(self, ready: Sequence[Job]) -> list[Job]:
        """Those of `ready` for which there is room now. The order of `ready` is that of claims."""

    def start(self, job: Job, fingerprint: str, lock: Lock) -> Attempt:
        """Start a job that was admitted."""

    def wait(self, seconds: float) -> None:
        """Return when an attempt may have something to say, or after `seconds`."""

    def room(self) -> str:
        """What there is and what is free, in a few words."""

    def close(self) -> None:
        """No job runs or waits any more."""
