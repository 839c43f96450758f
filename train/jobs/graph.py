"""Jobs, the order between them, and what identifies their results."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePath
from typing import Any


@dataclass(frozen=True)
class Job:
    """A function, its arguments, and the directory that takes what it makes.

    The call is `function(out=Path(out), **kwargs)`, in a fresh process. What it returns is
    dropped: results are files in `out`. Three names in `out` are the runner's: `job.json` (the
    record), `log.txt` (stdout and stderr of the job) and `job.lock`.

    - `function`: defined at the top of a module, so that another process can import it.
    - `kwargs`: JSON-able values or paths; part of the fingerprint.
    - `needs`: names of the jobs that must have finished before.
    - `threads`: compute threads of the job; it takes as many of the runner's slots.
    - `gpus`: GPUs of the job's own, the only ones that it sees. None: it sees what the runner sees.
    - `version`: change it when the code behind the function changes what comes out.
    """

    name: str
    function: Callable[..., object]
    kwargs: Mapping[str, Any]
    out: str | Path
    needs: Sequence[str] = ()
    threads: int = 1
    version: str = ""
    gpus: int | None = None

    @property
    def directory(self) -> Path:
        return Path(self.out)


def fingerprints(jobs: Sequence[Job]) -> dict[str, str]:
    """What identifies each job's result: name -> SHA-256 over function, kwargs, version and needs.

    `out`, `threads` and `gpus` do not count. Raises `ValueError` for a graph that cannot be run.
    """
    _check_names(jobs)
    _check_directories(jobs)
    by_name = {job.name: job for job in jobs}
    found: dict[str, str] = {}
    for name in _order(jobs):
        job = by_name[name]
        identity = {
            "function": _qualified_name(job),
            "kwargs": json.loads(_encode(job)),
            "version": job.version,
            "needs": [found[need] for need in job.needs],
        }
        text = json.dumps(identity, sort_keys=True)
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def _order(jobs: Sequence[Job]) -> list[str]:
    try:
        return list(TopologicalSorter({job.name: job.needs for job in jobs}).static_order())
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ValueError(f"jobs need each other in a circle: {circle}.") from None


def _check_names(jobs: Sequence[Job]) -> None:
    names = [job.name for job in jobs]
    for job in jobs:
        if names.count(job.name) > 1:
            raise ValueError(f"two jobs are called `{job.name}`.")
        for need in job.needs:
            if need not in names:
                known = ", ".join(names)
                raise ValueError(f"job `{job.name}` needs `{need}`, but there are only: {known}.")
        try:
            inspect.signature(job.function).bind(out=job.directory, **job.kwargs)
        except TypeError as error:
            call = f"{_qualified_name(job)}(out=..., {', '.join(f'{k}=...' for k in job.kwargs)})"
            raise ValueError(f"job `{job.name}`: {call} cannot be called: {error}.") from None


def _check_directories(jobs: Sequence[Job]) -> None:
    """A job may clear its directory, so no other job may live in it."""
    owner = {job.directory.resolve(): job.name for job in jobs}
    if len(owner) < len(jobs):
        twins = [job.name for job in jobs if owner[job.directory.resolve()] != job.name]
        raise ValueError(f"jobs share a directory with another job: {', '.join(twins)}.")
    for directory, name in owner.items():
        for parent in directory.parents:
            if parent in owner:
                raise ValueError(f"job `{name}` lies inside the directory of `{owner[parent]}`.")


def _qualified_name(job: Job) -> str:
    """`package.module.function`, the same whether the module was imported or run with `-m`."""
    module = job.function.__module__
    if module == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name if spec else module
    name = getattr(job.function, "__qualname__", "<lambda>")
    if "<" in name:
        raise ValueError(f"job `{job.name}`: {name} is not defined at the top of a module.")
    return f"{module}.{name}"


def _encode(job: Job) -> str:
    def plain(value: Any) -> str:
        if isinstance(value, PurePath):
            return str(value)
        raise ValueError(f"job `{job.name}`: kwargs hold {value!r}, which is not JSON or a path.")

    return json.dumps(dict(job.kwargs), default=plain)
