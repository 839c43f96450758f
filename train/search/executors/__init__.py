"""Where the jobs of a search run: `local` processes, or the nodes of a `ray` cluster.

settings = ExecutorSettings.parse({"kind": "ray", "address": "10.0.0.1:6379"}, "executor")
with closing(open_executor(settings)) as executor:
    results = executor.run(jobs, title="round 1")
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from eagle_moe.schema import Schema
from train.jobs.runner import GRACE
from train.search.executors.base import Executor, JobFailure, JobResult

__all__ = ["Executor", "ExecutorSettings", "JobFailure", "JobResult", "open_executor"]


class ExecutorSettings(Schema):
    """The section `executor` of a search.

    - `retries`: how often a job that a signal has ended, or that was lost with its node, is tried
      again. One that fails by itself is not.
    - `grace`: seconds that jobs have to save when the search is stopped.
    - `slots`: local: compute threads at the same time. Default: the CPU cores it may use.
    - `gpus`: local: GPUs that are handed out. Default: those that the driver sees.
    - `address`: ray: HOST:PORT of the head node, or "auto" for the cluster of this machine.
    """

    kind: Literal["local", "ray"] = "local"
    retries: int = Field(2, ge=0)
    grace: float = Field(GRACE, gt=0)
    slots: int | None = Field(None, gt=0)
    gpus: int | None = Field(None, ge=0)
    address: str | None = None

    @model_validator(mode="after")
    def _fields_of_its_kind(self) -> Self:
        of = {"local": ("slots", "gpus"), "ray": ("address",)}
        for kind, fields in of.items():
            for field in fields:
                if kind != self.kind and getattr(self, field) is not None:
                    raise ValueError(f"`{field}` is of kind: {kind}, but kind is {self.kind}")
        return self


def open_executor(settings: ExecutorSettings) -> Executor:
    """The executor that `settings` describe.

    Raises `ValueError` if it is a cluster that cannot be reached or Ray is not installed.
    """
    if settings.kind == "ray":
        from train.search.executors.ray import RayExecutor

        return RayExecutor(
            settings.address or "auto", retries=settings.retries, grace=settings.grace
        )
    from train.search.executors.local import LocalExecutor

    return LocalExecutor(
        settings.slots, settings.gpus, retries=settings.retries, grace=settings.grace
    )
