"""A job on a node of a Ray cluster, as the driver sees it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, cast

from train.jobs.directory import read_record
from train.jobs.host import VISIBLE, Host, sweep
from train.jobs.place import Ending, Progress
from train.jobs.worker import Task
from train.search.executors import cluster


class RayAttempt:
    """A `Host` in the placement group `group`, which it gives back; implements `Attempt`."""

    def __init__(
        self, task: Task, gpus: int, group: Any, closed: Callable[[RayAttempt], None]
    ) -> None:
        import ray
        from ray.util import placement_group_table
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.ending: Ending | None = None
        self._task = task
        self._group = group
        self._closed = closed
        self._node: str = placement_group_table(group)["bundles_to_node_id"][0]
        self.where = cluster.name(self._node)
        self._session: int | None = None
        self._loss = ""
        self._heard = time.monotonic()
        self._ended_since: float | None = None
        in_group = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        room = {"num_cpus": task.threads, "num_gpus": gpus, "scheduling_strategy": in_group}
        actor = cast(Any, ray.remote(Host))
        self._host = actor.options(**room).remote()
        self.reply: Any = self._host.start.remote(os.getcwd(), sys.path, task)
        """What is waited for; None where nothing is but time."""

    def listen(self) -> Iterator[Progress]:
        import ray

        if self.ending is None and self._loss:
            self._end_when_nothing_is_left()
        elif self.ending is None and ray.wait([self.reply], timeout=0)[0]:
            try:
                answer = ray.get(self.reply)
            except ray.exceptions.ActorUnavailableError:
                pass  # perhaps for a moment
            except (ray.exceptions.RayError, ImportError) as error:
                self._note_loss(error)
                return
            else:
                self._heard = time.monotonic()
                yield from self._take(answer)
            self.reply = self._host.poll.remote()

    def _take(self, answer: Any) -> Iterator[Progress]:
        """An answer of `Host.start` or of `Host.poll`."""
        if isinstance(answer, str):
            self.where += answer
            return
        self._session, progress, ending = answer
        if progress is not None:
            yield progress
        if ending is not None:
            self._end_when_seen(ending)

    def _end_when_seen(self, ending: Ending) -> None:
        """A job that went well has ended when what it wrote is seen on this side as well."""
        if self._ended_since is None:
            self._ended_since = time.monotonic()
        record = read_record(self._task.out)
        seen = record is not None and record.status == "finished"
        if ending.code != 0 or seen:
            self.ending = ending
        elif time.monotonic() > self._ended_since + VISIBLE:
            self.ending = Ending(None, f"what it wrote on {self.where} is not seen by the driver")

    def _note_loss(self, error: BaseException) -> None:
        """Its process on the node is gone, or the node; perhaps a process of the job is not."""
        self._loss = f"on {self.where}: {cluster.explain(error)}"
        self.reply = cluster.on(self._node, sweep).remote(self._task.mark, self._session)

    def _end_when_nothing_is_left(self) -> None:
        """When the node says so, or else when the keeper has surely seen to it."""
        import ray

        if self.reply is not None and ray.wait([self.reply], timeout=0)[0]:
            try:
                ray.get(self.reply)
                self.ending = Ending(None, self._loss)
            except (ray.exceptions.RayError, ImportError):
                self.reply = None
        elif time.monotonic() > self._heard + 2 * self._task.lease:
            self.ending = Ending(None, self._loss)

    def signal(self, number: signal.Signals) -> None:
        import ray

        if number == signal.SIGKILL:  # its keeper sees that the owner is gone
            ray.kill(self._host)
        else:
            self._host.signal.remote(number)

    def close(self) -> None:
        import ray
        from ray.util import remove_placement_group

        with suppress(ray.exceptions.RayError):
            ray.kill(self._host)
        remove_placement_group(self._group)
        self._closed(self)
