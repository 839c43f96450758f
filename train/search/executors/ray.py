"""Jobs of a search on the nodes of a Ray cluster.

    driver            a node, in a placement group: GPUs and CPUs of one node
    runner, RayPlace  Host (an actor)  --  keeper (own session)  --  job  --  torchrun, ranks, ...

Ray says where a job has room and when a node is lost. The processes of a job are ended by its
keeper, as on one machine (`train.jobs.keeper`). A keeper that has not heard from its driver for
`LEASE` seconds ends its job, and after the loss of a node the driver waits twice as long: a node
that is only cut off never works in the directory of a job that runs again elsewhere.
"""

from __future__ import annotations

import os
import pickle
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.jobs import Job, JobFailure, JobResult, OnEnd, try_jobs
from train.jobs.directory import Lock
from train.jobs.host import VISIBLE, look_around
from train.jobs.keeper import new_mark
from train.jobs.worker import Task
from train.search.executors import cluster
from train.search.executors.attempt import RayAttempt

LEASE = 30.0


class RayExecutor:
    """An `Executor` on the cluster at `address` ("auto": the one that this machine belongs to).

    `retries`, `grace`: as in `try_jobs`. Raises `ValueError` if Ray is not installed or no cluster
    answers.
    """

    def __init__(self, address: str, *, retries: int, grace: float) -> None:
        cluster.connect(address)
        self.place = RayPlace()
        self.retries = retries
        self.grace = grace

    def run(
        self, jobs: Sequence[Job], title: str, on_end: OnEnd | None = None
    ) -> dict[str, JobResult | JobFailure]:
        return try_jobs(
            jobs,
            self.place,
            title=title,
            retries=self.retries,
            grace=self.grace,
            on_end=on_end,
        )

    def close(self) -> None:
        import ray

        ray.shutdown()


class RayPlace:
    """The nodes of the cluster that this process is connected to; implements `Place`."""

    def __init__(self) -> None:
        self._groups: dict[str, Any] = {}
        self._running: list[RayAttempt] = []
        self._seen: set[tuple[str, Path]] = set()

    # -- what there is

    def check(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if not self._threads(job):
                most = max((cluster.amount(node, "GPU") for node in cluster.nodes()), default=0)
                raise ValueError(
                    f"job `{job.name}` asks for {job.gpus or 0} GPUs and a CPU on one node, but "
                    f"no node of the cluster has more than {most} GPUs. Give it fewer, or add "
                    "such a node first."
                )

    def _threads(self, job: Job) -> int:
        """As many as it asks for, or as the best node has of those with enough GPUs."""
        fitting = [n for n in cluster.nodes() if cluster.amount(n, "GPU") >= (job.gpus or 0)]
        return min(job.threads, max((cluster.amount(n, "CPU") for n in fitting), default=0))

    def open(self, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
        """Raises `ValueError` naming the nodes that do not see the files of this one."""
        roots = {job.directory.parent for job in jobs}
        fresh = {
            node["NodeID"]: unseen
            for node in cluster.nodes()
            if (unseen := {root for root in roots if (node["NodeID"], root) not in self._seen})
        }
        if not fresh:
            return
        unlocked = self._look_around(fresh, str(jobs[0].directory))
        self._seen.update((node, root) for node, unseen in fresh.items() for root in unseen)
        if unlocked:
            say(
                f"locks do not reach {', '.join(unlocked)} on this storage: nothing will stop a "
                "second driver that is started there on the same directories."
            )

    def _look_around(self, fresh: dict[str, set[Path]], locked: str) -> list[str]:
        """Have nodes look at their roots; returns the names of those that do not see the locks."""
        wrong, unlocked = [], []
        roots = {root for unseen in fresh.values() for root in unseen}
        tokens = {root: root / f".seen-{uuid.uuid4().hex}" for root in roots}
        try:
            for token in tokens.values():
                token.write_text(token.name, encoding="utf-8")
            look = {
                node: cluster.on(node, look_around).remote(
                    os.getcwd(), {str(tokens[root]): tokens[root].name for root in unseen}, locked
                )
                for node, unseen in fresh.items()
            }
            for node, reply in look.items():
                problem, locks = _what_it_sees(reply)
                if problem:
                    wrong.append(f"node {cluster.name(node)} {problem}.")
                elif not locks:
                    unlocked.append(cluster.name(node))
        finally:
            for token in tokens.values():
                token.unlink(missing_ok=True)
        if wrong:
            raise ValueError(
                "\n".join(wrong) + "\nAll nodes need the checkout, the environment and the output "
                "on storage that they share, under the same paths."
            )
        return unlocked

    def room(self) -> str:
        import ray

        there, free = ray.cluster_resources(), ray.available_resources()
        parts = [
            f"{free.get(kind, 0):g} of {there[kind]:g} {kind}s"
            for kind in ("GPU", "CPU")
            if kind in there
        ]
        return f"free on {len(cluster.nodes())} nodes: {', '.join(parts)}"

    # -- jobs

    def admit(self, ready: Sequence[Job]) -> list[Job]:
        from ray.util import placement_group, placement_group_table

        for job in ready:
            if job.name not in self._groups and (threads := self._threads(job)):
                bundle = {"CPU": threads, "GPU": job.gpus or 0}
                asked = {kind: count for kind, count in bundle.items() if count}
                self._groups[job.name] = placement_group([asked], strategy="STRICT_PACK")
        groups = {job.name: self._groups[job.name] for job in ready if job.name in self._groups}
        table = placement_group_table() if groups else {}
        placed = {
            name
            for name, group in groups.items()
            if table.get(group.id.hex(), {}).get("state") == "CREATED"
        }
        return [job for job in ready if job.name in placed]

    def start(self, job: Job, fingerprint: str, lock: Lock) -> RayAttempt:
        group = self._groups.pop(job.name)
        task = Task(
            job.name,
            pickle.dumps((job.function, dict(job.kwargs))),
            job.directory,
            int(group.bundle_specs[0]["CPU"]),
            fingerprint,
            new_mark(),
            (),  # which ones, its host will say
            LEASE,
        )
        attempt = RayAttempt(task, job.gpus or 0, group, self._running.remove)
        self._running.append(attempt)
        return attempt

    def wait(self, seconds: float) -> None:
        import ray

        replies = [each.reply for each in self._running if not each.ending and each.reply]
        if replies:
            ray.wait(replies, timeout=seconds)
        else:
            time.sleep(seconds)

    def close(self) -> None:
        from ray.util import remove_placement_group

        for group in self._groups.values():
            remove_placement_group(group)
        self._groups.clear()


def _what_it_sees(reply: Any) -> tuple[str, bool]:
    """The answer of `look_around`; a node that gives none has a problem."""
    import ray

    try:
        return ray.get(reply, timeout=2 * VISIBLE)
    except (ray.exceptions.RayError, ImportError) as error:
        return f"cannot run this code: {cluster.explain(error)}", True
