"""Runs a graph of jobs: in order, in parallel, once.

    a = Job("words", make_words, {"count": 100}, out="runs/x/words")
    b = Job("reader", train_reader, {"steps": 500}, out="runs/x/reader", needs=["words"])
    results = run_jobs([a, b])

A job that finished is not run again until its function's name, its arguments, its `version` or
something that it needs has changed; an interrupted one is run again in the same directory.
`run_jobs` uses this machine; `try_jobs` any `Place`, and it returns what failed.
"""

from train.jobs.directory import DirectoryBusy
from train.jobs.graph import Job
from train.jobs.local import LocalPlace
from train.jobs.runner import JobFailure, JobResult, JobsFailed, OnEnd, run_jobs, try_jobs
from train.jobs.worker import progress

__all__ = [
    "DirectoryBusy",
    "Job",
    "JobFailure",
    "JobResult",
    "JobsFailed",
    "LocalPlace",
    "OnEnd",
    "progress",
    "run_jobs",
    "try_jobs",
]
