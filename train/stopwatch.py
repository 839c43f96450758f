"""Where the time of a run goes, on the clock of the device that does the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

_KEPT = 512


class Stopwatch(Stateful):
    """One activity at a time: `switch` ends one and begins another, so that the parts add up.

    On a GPU, moments are events in the stream of its work, read once they have passed: nothing is
    waited for, and waiting for data counts only in so far as the GPU had nothing else to do.
    Elsewhere they are taken from the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.activity: str | None = None
        """What goes on now; None: nothing that counts."""
        self._moments: list[tuple[str | None, Any]] = []
        self._seconds: dict[str, float] = {}

    def switch(self, activity: str | None) -> None:
        """From now on, time belongs to `activity`."""
        if activity == self.activity:
            return
        self.activity = activity
        self._moments.append((activity, self._now()))
        if len(self._moments) > _KEPT:
            self._add_up(wait=False)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the block does not count."""
        before = self.activity
        self.switch(None)
        try:
            yield
        finally:
            self.switch(before)

    def lap(self) -> dict[str, float]:
        """Seconds by activity since the last lap."""
        seconds = self.state_dict()
        self._seconds = {}
        return seconds

    def state_dict(self) -> dict[str, float]:
        """The same, and the lap goes on: also in another process, which loads it."""
        self._moments.append((self.activity, self._now()))
        self._add_up(wait=True)
        return dict(self._seconds)

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on with a lap that was begun elsewhere."""
        self._seconds = dict(state_dict)

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_up(self, wait: bool) -> None:
        if self.on_gpu and wait:
            self._moments[-1][1].synchronize()
        passed = 0
        for (activity, start), (_, end) in zip(self._moments, self._moments[1:], strict=False):
            if self.on_gpu and not end.query():
                break
            passed += 1
            if activity is not None:
                took = start.elapsed_time(end) / 1000 if self.on_gpu else end - start
                self._seconds[activity] = self._seconds.get(activity, 0.0) + took
        del self._moments[:passed]
