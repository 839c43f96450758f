"""Several processes on this machine that talk through gloo, forked from the test."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def on_ranks(
    call: Callable[[int], Any], folder: Path, count: int = 2, limit: int = 60
) -> list[Any]:
    """What `call(rank)` returns in each of `count` processes; exceptions come back as they are.

    `folder`: for the results. A process that hangs is ended after `limit` seconds, and fails the
    test.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_child, args=(call, rank, count, port, folder / f"{rank}.pickle"))
        for rank in range(count)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(limit)
    hanging = [rank for rank, child in enumerate(children) if child.is_alive()]
    for child in children:
        child.kill()
    assert not hanging, f"ranks {hanging} wait for ever"
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)]


def _child(call: Callable[[int], Any], rank: int, count: int, port: int, path: Path) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for state in (AcceleratorState, GradientState, PartialState):  # what the parent has set up
        state._shared_state.clear()
    try:
        result = call(rank)
    except Exception as error:
        traceback.print_exc()
        result = error
    path.write_bytes(pickle.dumps(result))
    os._exit(0)  # without waiting for the other's end of the connection
