"""The harness as a child of this process: started, listened to, and never left behind."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from eval.harness import MARK
from eval.kept import OnProgress

ROOT = Path(__file__).parents[1]
BEAT = 1.0
"""Seconds between two calls of a `heartbeat`."""
SECONDS_TO_END = 10
"""That the child has to end when it is told to, before it is killed."""
LAUNCHED = (
    *("ACCELERATE_", "FSDP_", "GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCHELASTIC_"),
    "WORLD_SIZE",
)
"""How the variables begin by which a launcher tells a process that it is one of several. The child
of such a process is none of them."""


def follow(
    command: list[str],
    log: Any,
    progress: OnProgress | None,
    heartbeat: Callable[[], None] | None = None,
) -> tuple[int, dict[str, Any] | None]:
    """Run `command`, report its progress, and end it if this process is interrupted.

    `heartbeat` is called every second; what it raises ends the child, as an interruption does.
    Returns the exit status, and the first error that the child has told.
    """
    error = None
    with subprocess.Popen(
        command,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    ) as process:
        try:
            for line in _lines(process, heartbeat):
                if not line.startswith(MARK):
                    log.write(line)
                    continue
                told = json.loads(line.removeprefix(MARK))
                if told["kind"] == "error":
                    error = error or told
                elif progress is not None:
                    progress(told["done"], told["total"], told["note"])
        except BaseException:
            _end(process)
            raise
        return process.wait(), error


def _environment() -> dict[str, str]:
    """Of a process that finds this repository, and takes itself for nobody's rank."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    path = os.pathsep.join(filter(None, (str(ROOT), own.get("PYTHONPATH"))))
    return own | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


def _lines(process: subprocess.Popen[str], heartbeat: Callable[[], None] | None) -> Iterator[str]:
    """What the child prints, until it ends; heartbeats in between."""
    output = process.stdout
    assert output is not None
    if heartbeat is None:
        yield from output
        return
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="harness-output", daemon=True).start()
    due = time.monotonic()
    while True:
        if (left := due - time.monotonic()) <= 0:
            heartbeat()
            due = time.monotonic() + BEAT
            continue
        try:
            line = lines.get(timeout=left)
        except queue.Empty:
            continue
        if line is None:
            return
        yield line


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
