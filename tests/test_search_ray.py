"""A Ray cluster of two nodes with made-up GPUs, all on this machine: rooms, losses, no orphans."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster_jobs import look, save_when_asked, torchrun, wait_to_go
from tests.processes import assert_gone, start_program, wait_for
from train.jobs import Job, JobFailure, JobResult
from train.jobs.host import look_around
from train.search.executors import ExecutorSettings, open_executor

ray = pytest.importorskip("ray")

NODE = {"num_cpus": 4, "num_gpus": 2, "object_store_memory": 80 * 2**20}
End = JobResult | JobFailure


def runs_of(out: Path) -> list[Any]:
    return [json.loads(line) for line in wait_for(out / "runs.txt", 60).splitlines()]


def host_on(raylet: str) -> int:
    """The actor of Ray's that owns a job on this node."""
    below = psutil.Process(int(raylet)).children()
    (host,) = [process.pid for process in below if "ray::Host" in process.cmdline()[0]]
    return host


def parents(pid: int, count: int) -> list[int]:
    return [process.pid for process in psutil.Process(pid).parents()[:count]]


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# -- the cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    there = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    there.add_node(**NODE)
    yield there
    there.shutdown()


@pytest.fixture(scope="module")
def run(cluster: Any) -> Iterator[Callable[..., dict[str, End]]]:
    with closing(open_executor(settings(cluster.address))) as executor:
        yield lambda *jobs: executor.run(jobs, "round 1")


def settings(address: str) -> ExecutorSettings:
    return ExecutorSettings(kind="ray", address=address)


@contextmanager
def in_background(
    run: Callable[..., dict[str, End]], go: Path, *jobs: Job
) -> Iterator[dict[str, End]]:
    """Run the jobs meanwhile; `go` lets them end, and what is yielded holds how when it is left."""
    ends: dict[str, End] = {}
    thread = threading.Thread(target=lambda: ends.update(run(*jobs)), daemon=True)
    thread.start()
    try:
        yield ends
    finally:
        go.touch()
        thread.join(90)
    assert not thread.is_alive()


def test_every_job_has_gpus_of_its_own_and_is_not_run_twice(
    run: Callable[..., dict[str, End]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = [Job(n, look, {}, tmp_path / n, gpus=1, threads=2) for n in "ab"]
    several = [
        Job("c", torchrun, {}, tmp_path / "c", gpus=2, threads=9),
        Job("d", look, {}, tmp_path / "d", gpus=2),
    ]
    none = Job("e", look, {}, tmp_path / "e", needs=["a"])
    ends = run(*several, *single, none)
    assert all(isinstance(end, JobResult) and not end.reused for end in ends.values()), ends

    facts, began = {}, {}
    for name in ends:
        facts[name], _, began[name] = json.loads((tmp_path / name / "facts.json").read_text())
    taken: dict[str, list[tuple[float, float, str]]] = {}
    for name, seen in facts.items():
        until = (tmp_path / name / "job.json").stat().st_mtime
        for number in filter(None, seen["CUDA_VISIBLE_DEVICES"].split(",")):
            gpu = f"{seen['RAY_RAYLET_PID']}:{number}"
            taken.setdefault(gpu, []).append((began[name], until, name))
    for gpu, spans in taken.items():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), (gpu, spans)
    asked = {name: len(seen["CUDA_VISIBLE_DEVICES"].split(",")) for name, seen in facts.items()}
    assert (asked["a"], asked["b"], asked["c"], asked["d"]) == (1, 1, 2, 2)
    assert facts["e"]["CUDA_VISIBLE_DEVICES"] == ""
    assert len({seen["RAY_RAYLET_PID"] for seen in facts.values()}) == 2
    assert facts["a"]["OMP_NUM_THREADS"] == "2" and facts["c"]["OMP_NUM_THREADS"] == "4"
    ranks = [json.loads((tmp_path / "c" / f"rank{n}.json").read_text()) for n in (0, 1)]
    assert [r["CUDA_VISIBLE_DEVICES"] for r in ranks] == ["0,1", "0,1"]
    assert [r["WORLD_SIZE"] for r in ranks] == ["2", "2"]

    shown = capsys.readouterr().out
    host = ray.nodes()[0]["NodeManagerHostname"]
    assert f"c: {ends['c'].seconds:.1f} s ({host}/" in shown and "GPU 0,1)" in shown
    assert all(end.reused for end in run(*several, *single, none).values())


def test_what_a_lost_process_or_node_has_run_runs_again(
    run: Callable[..., dict[str, End]],
    cluster: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.search.executors.ray.LEASE", 5.0)
    head, (lost,) = cluster.head_node, cluster.worker_nodes
    raylets = [str(node.all_processes["raylet"][0].process.pid) for node in (head, lost)]
    jobs = [Job(name, wait_to_go, {}, tmp_path / name, gpus=2) for name in "ab"]
    with in_background(run, tmp_path / "go", *jobs) as ends:
        first = {name: runs_of(tmp_path / name)[0] for name in "ab"}
        nodes = {raylet: name for name, (raylet, *_) in first.items()}
        assert set(nodes) == set(raylets), "each has a node to itself"
        on_head, on_lost = (nodes[raylet] for raylet in raylets)

        _, job, daemon, _ = first[on_head]
        (keeper,) = parents(job, 1)
        os.kill(host_on(first[on_head][0]), signal.SIGKILL)
        wait_until(lambda: len(runs_of(tmp_path / on_head)) == 2)
        assert_gone([job, daemon, keeper], 0)

        _, job, daemon, _ = first[on_lost]
        (keeper,) = parents(job, 1)
        cluster.remove_node(lost, allow_graceful=False)
        assert_gone([job, daemon, keeper], 60)  # Ray takes its time to notice
    assert all(isinstance(end, JobResult) for end in ends.values()), ends
    again = runs_of(tmp_path / on_lost)
    assert len(again) == 2 and again[1][0] == raylets[0], "it went to the node that is left"
    assert len(runs_of(tmp_path / on_head)) == 2
    assert capsys.readouterr().out.count("attempt 2 of 3 follows") == 2
    cluster.add_node(**NODE)


def quick_and_long(folder: Path) -> list[Job]:
    return [
        Job("quick", look, {}, folder / "quick"),
        Job("long", wait_to_go, {}, folder / "long", gpus=1),
    ]


def test_nothing_is_left_of_a_driver_that_was_killed_and_it_goes_on(
    run: Callable[..., dict[str, End]], cluster: Any, tmp_path: Path
) -> None:
    source = (
        "from tests.test_search_ray import *\n"
        f"with closing(open_executor(settings({cluster.address!r}))) as executor:\n"
        "    executor.run(quick_and_long(out), 'round 1')\n"
    )
    started = start_program(tmp_path, source)
    _, job, daemon, _ = runs_of(tmp_path / "long")[0]
    (keeper,) = parents(job, 1)
    wait_until(lambda: "finished" in wait_for(tmp_path / "quick" / "job.json"))
    started.kill()
    started.wait()
    assert_gone([job, daemon, keeper], 60)
    (tmp_path / "go").touch()
    ends = run(*quick_and_long(tmp_path))
    assert [ends[name].reused for name in ("quick", "long")] == [True, False]
    assert len(runs_of(tmp_path / "long")) == 2


def test_a_driver_that_is_stopped_lets_its_jobs_save(
    run: Callable[..., dict[str, End]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        wait_for(tmp_path / "a" / "pid.txt", 60)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as end:
        run(Job("a", save_when_asked, {}, tmp_path / "a", gpus=1))
    assert end.value.code == 128 + signal.SIGTERM
    assert "same command again" in capsys.readouterr().out
    assert (tmp_path / "a" / "saved.txt").exists()
    assert_gone([int((tmp_path / "a" / "pid.txt").read_text())], 0)


def test_more_gpus_than_any_node_has_are_refused_at_once(
    run: Callable[..., dict[str, End]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="`a` asks for 3 GPUs .* one node.* more than 2"):
        run(Job("a", look, {}, tmp_path / "a", gpus=3))
    assert not list(tmp_path.iterdir())


def test_nodes_without_the_checkout_are_named(
    run: Callable[..., dict[str, End]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"node .* has no checkout in {tmp_path}.*\n.*share"):
        run(Job("a", look, {}, tmp_path / "a"))
    assert not list(tmp_path.glob(".seen-*"))


# -- without a cluster


def test_what_a_node_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.jobs.directory import Lock

    monkeypatch.setattr("train.jobs.host.VISIBLE", 0.5)
    here, token = os.getcwd(), tmp_path / "token"
    lock = Lock.take(tmp_path)
    problem, _ = look_around(here, {str(token): "x"}, str(tmp_path))
    assert problem == f"does not see what the driver writes to {tmp_path}"
    token.write_text("x")
    assert look_around(here, {str(token): "x"}, str(tmp_path)) == ("", True)
    lock.release()
    assert look_around(here, {str(token): "x"}, str(tmp_path)) == ("", False)


def test_a_cluster_that_does_not_answer_is_named_in_finite_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.search.executors.cluster.CONNECT", 3.0)
    with pytest.raises(ValueError, match=r"no Ray cluster answers at 127\.0\.0\.1:9 within 3 s"):
        open_executor(settings("127.0.0.1:9"))
    monkeypatch.setattr("train.search.executors.cluster.CONNECT", 60.0)
    with pytest.raises(ValueError, match=r"cannot use the Ray cluster at hello: .*HOST:PORT"):
        open_executor(settings("hello"))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"Install eagle-moe\[search\]"):
        open_executor(settings("auto"))
