"""Jobs of a search as processes of this machine."""

from __future__ import annotations

from collections.abc import Sequence

from train.jobs import Job, JobFailure, JobResult, LocalPlace, OnEnd, try_jobs


class LocalExecutor:
    """An `Executor`: `slots`, `gpus` as in `LocalPlace`, `retries`, `grace` as in `try_jobs`."""

    def __init__(self, slots: int | None, gpus: int | None, *, retries: int, grace: float) -> None:
        self.place = LocalPlace(slots, gpus)
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
        """Nothing is held between two runs."""
