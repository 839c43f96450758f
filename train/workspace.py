"""The state of a run on disk: not begun, unfinished or finished; with these settings or others."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eagle_moe.checkpoint import Complete, read_complete, remove_drafts, write_json
from train.jobs.directory import Lock
from train.stages import StageRun

IDENTITY = "identity.json"
"""In a workspace: what determines the result of the run that began there."""

logger = logging.getLogger(__name__)


def mark_of(run: StageRun, identity: Mapping[str, Any]) -> Complete:
    """What this run's checkpoint and resume points are marked with."""
    # as it will be read back, so that what was written compares equal
    plain = json.loads(json.dumps(identity))
    return Complete(stage=run.name, expert=run.expert, identity=plain)


def is_finished(run: StageRun, mark: Complete, redo: bool) -> bool:
    """Whether the run's checkpoint is there already.

    Raises `ValueError` if there is one that was made otherwise, unless it may be replaced.
    """
    there = read_complete(run.folder)
    if there is None:
        return False
    if there.identity != mark.identity:
        if redo:
            return False
        raise ValueError(
            f"{run.folder}: it was made with other settings or inputs:\n"
            f"{differences(there.identity, mark.identity)}\n"
            "Choose another `output_dir`, remove the folder, or pass --redo to replace it."
        )
    return True


def open_workspace(run: StageRun, mark: Complete, redo: bool) -> Path | None:
    """Make the run's workspace ready; the resume point to continue from, if there is one.

    Raises `ValueError` if an unfinished run with other settings lives there, unless it may be
    discarded.
    """
    point = last_point(run.workspace)
    path = run.workspace / IDENTITY
    if path.is_file():
        began = json.loads(path.read_text(encoding="utf-8"))
        if began != mark.identity:
            if point is not None and not redo:
                raise ValueError(
                    f"{run.workspace}: an unfinished run with other settings or inputs is there:\n"
                    f"{differences(began, mark.identity)}\n"
                    "Choose another `output_dir`, remove the folder, or pass --redo to discard it."
                )
            clear(run.workspace)
            point = None
    run.workspace.mkdir(parents=True, exist_ok=True)
    remove_drafts(run.workspace)
    write_json(path, mark.identity)
    return point


def clear(workspace: Path) -> None:
    """Remove what is in a workspace, but not the lock on it."""
    for path in workspace.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".lock":
            path.unlink()


@contextmanager
def locked(run: StageRun) -> Iterator[None]:
    """Keep other processes out of the workspace. Raises `DirectoryBusy` if one works there."""
    lock = Lock.take(run.workspace)
    try:
        yield
    finally:
        lock.release()


def remove_workspace(run: StageRun) -> None:
    """Remove a run's workspace, and the folders above it that this leaves empty."""
    shutil.rmtree(run.workspace, ignore_errors=True)
    for folder in run.workspace.parents:
        if folder == Path(run.recipe.output_dir) or not folder.exists() or any(folder.iterdir()):
            return
        folder.rmdir()


def last_point(workspace: Path) -> Path | None:
    """The latest complete resume point; damaged ones are named in the log and passed over."""
    points = sorted(workspace.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    for point in reversed(points):
        try:
            if read_complete(point) is not None:
                return point
        except ValueError as error:
            logger.warning("%s", error)
    return None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 8) -> str:
    """One line per key whose value differs."""
    absent = "(none)"
    keys = [key for key in sorted(set(old) | set(new)) if old.get(key) != new.get(key)]
    lines = [f"  {key}: {old.get(key, absent)} -> {new.get(key, absent)}" for key in keys[:limit]]
    if len(keys) > limit:
        lines.append(f"  ... and {len(keys) - limit} more")
    return "\n".join(lines)
