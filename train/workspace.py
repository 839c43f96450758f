"""The state of a run on disk: not begun, unfinished or finished; with these settings or others."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eagle_moe.checkpoint import Complete, read_complete, remove_drafts, replace_text
from train.jobs.directory import Lock
from train.stages import StageRun

IDENTITY = "identity.json"
"""In a workspace: what determines the result of the run that began there."""


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

    Raises `ValueError` that names what differs if an unfinished run with other settings lives
    there, or a resume point of another run was put there, unless it may be discarded.
    """
    point, faults = _last_point(run.workspace)
    for fault in faults:
        print(f"{run.title}: passed over {fault}")
    path = run.workspace / IDENTITY
    began = _read_identity(path)
    if point is not None and (complete := read_complete(point)) is not None:
        began = complete.identity  # of the point that would be used, whoever has put it there
    if began not in (None, mark.identity):
        if point is not None and not redo:
            raise ValueError(
                f"{point}: an unfinished run with other settings or inputs is there:\n"
                f"{differences(began, mark.identity)}\n"
                "Choose another `output_dir`, remove the folder, or pass --redo to discard it."
            )
        clear(run.workspace)
        point = None
    run.workspace.mkdir(parents=True, exist_ok=True)
    remove_drafts(run.workspace)
    if _read_identity(path) != mark.identity:  # so that of several processes only one writes
        replace_text(path, json.dumps(mark.identity, indent=1, ensure_ascii=False))
    return point


def _read_identity(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


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
    """Remove a finished run's workspace, and the folders above it that this leaves empty."""
    remove_drafts(run.folder.parent, run.folder.name)
    shutil.rmtree(run.workspace, ignore_errors=True)
    for folder in run.workspace.parents:
        if folder == Path(run.recipe.output_dir) or not folder.exists() or any(folder.iterdir()):
            return
        folder.rmdir()


def last_point(workspace: Path) -> Path | None:
    """The latest complete resume point."""
    return _last_point(workspace)[0]


def _last_point(workspace: Path) -> tuple[Path | None, list[str]]:
    """The latest complete resume point, and what is wrong with later ones."""
    faults: list[str] = []
    for point in reversed(_points(workspace)):
        if (fault := _fault(point)) is None:
            return point, faults
        faults.append(fault)
    return None, faults


def retire_points(workspace: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Remove old resume points: beside those in `keep`, the last `limit` complete ones stay.

    A damaged one counts for nothing; it goes when a later one is complete. Without a limit above 0
    all stay.
    """
    if limit is None or limit <= 0:
        return
    points = _points(workspace)
    whole = [point for point in points if _fault(point) is None]
    last = points.index(whole[-1]) if whole else 0
    stay = {*whole[-limit:], *keep}
    for point in points[:last]:
        if point not in stay:
            # Under another name first: one that is half removed must not look like a damaged one.
            retired = point.with_name(f".{point.name}.retired")
            point.rename(retired)
            shutil.rmtree(retired, ignore_errors=True)


def _points(workspace: Path) -> list[Path]:
    """Folders called as resume points are, by step."""
    steps = {
        path: int(match[1])
        for path in workspace.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return sorted(steps, key=lambda path: steps[path])


def _fault(point: Path) -> str | None:
    """Why it is no complete resume point."""
    try:
        return None if read_complete(point) else f"{point}: it was not written to its end."
    except (ValueError, OSError) as error:
        return str(error)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 8) -> str:
    """One line per key whose value differs."""
    absent = "(none)"
    keys = [key for key in sorted(set(old) | set(new)) if old.get(key) != new.get(key)]
    lines = [f"  {key}: {old.get(key, absent)} -> {new.get(key, absent)}" for key in keys[:limit]]
    if len(keys) > limit:
        lines.append(f"  ... and {len(keys) - limit} more")
    return "\n".join(lines)
