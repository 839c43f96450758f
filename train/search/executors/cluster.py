"""A Ray cluster as a driver sees it: the connection, its nodes, a function on one of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

CONNECT = 30.0
"""Seconds in which a cluster must answer; by itself Ray tries for many minutes."""

Node = dict[str, Any]
"""As `ray.nodes` describes it."""


def connect(address: str) -> None:
    """Raises `ValueError` if Ray is not installed or no cluster answers at `address`."""
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "executor: kind: ray needs Ray. Install eagle-moe[search], or say kind: local."
        ) from error
    arguments: dict[str, Any] = {
        "address": address,
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    # In a process of its own first, because a call that is not answered cannot be given up.
    attempt = f"import ray; ray.init(**{arguments!r}); ray.shutdown()"
    remedy = (
        "Is it running (ray status), is executor.address the HOST:PORT of its head node, and is "
        "this machine one of its nodes (ray start --address=HOST:PORT)?"
    )
    try:
        subprocess.run(
            [sys.executable, "-c", attempt], check=True, timeout=CONNECT, capture_output=True
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"executor: no Ray cluster answers at {address} within {CONNECT:.0f} s. {remedy}"
        ) from None
    except subprocess.CalledProcessError as error:
        why = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(
            f"executor: cannot use the Ray cluster at {address}: {''.join(why)} {remedy}"
        ) from None
    ray.init(**arguments)


def nodes() -> list[Node]:
    """Those that are up."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def amount(node: Node, kind: str) -> int:
    """How much a node has of "CPU" or "GPU"."""
    return int(node["Resources"].get(kind, 0))


def name(node_id: str) -> str:
    """A node's host name, and the start of its id where several have the same."""
    import ray

    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    host = hosts[node_id]
    return f"{host}/{node_id[:6]}" if list(hosts.values()).count(host) > 1 else host


def on(node_id: str, function: Callable[..., Any]) -> Any:
    """`function` as a remote one that runs on this node or fails; it needs no room there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return ray.remote(function).options(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    )


def explain(error: BaseException) -> str:
    """An error of Ray's in a line: its cause, which stands last after a traceback, else first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "ray::" in str(error) or "Traceback" in str(error) else lines[0]
