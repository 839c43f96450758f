"""The SLURM script of a search: what it starts and in which order, with stand-ins for all of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import wait_for

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train/slurm/search.sbatch"

SRUN = """#!/usr/bin/env bash
told=("$@")
while [[ $1 == --* ]]; do shift; done
echo "srun ${told[*]}" >>"$CALLS"
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf "$HOSTS"; else echo "scontrol $*" >>"$CALLS"; fi
"""
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *get_node_ip_address*) echo 10.0.0.7 ;;
  *" start "*) exec sleep 60 ;;
  *" status "*) echo status >>"$CALLS" ;;
  *train.search*)
    # srun works in the background: its stand-ins may not have written yet
    until [[ $(grep -c ^srun "$CALLS") -ge $STEPS ]]; do sleep 0.05; done
    echo "driver $*" >>"$CALLS"
    trap 'exit 143' TERM
    for _ in {1..600}; do [[ $DRIVER ]] && exit "$DRIVER"; sleep 0.1; done ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "PYTHON": str(tmp_path / "python"),
        "HOSTS": "node0\\nnode1\\nnode2\\n",
        "STEPS": "2",
        "DRIVER": "0",
        "SLURM_JOB_ID": "71234",
        "SLURM_JOB_NODELIST": "node[0-2]",
        "SLURM_CPUS_PER_TASK": "40",
        "SLURM_GPUS_ON_NODE": "8",
    }


def start(environment: dict[str, str]) -> subprocess.Popen[str]:
    command = ["bash", str(SCRIPT), "search.yaml", "seeds=[0]"]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **out)  # type: ignore[call-overload]


def test_a_cluster_is_started_and_the_driver_told_where_it_is(cluster: dict[str, str]) -> None:
    job = start(cluster)
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 0, said
    *before, driver = Path(cluster["CALLS"]).read_text().splitlines()
    # nodes are asked for in the background: only the driver's place in the order is sure
    others, head, status = sorted(before, key=lambda line: (line == "status", "--head" in line))
    assert "--nodes=1 --ntasks=1 --nodelist=node0" in head and "--head" in head
    assert "--num-cpus 40 --num-gpus 8" in head and "--port 31234" in head
    assert status == "status"
    assert "--nodes=2 --ntasks=2 --exclude=node0" in others
    assert "--num-cpus 40 --num-gpus 8 --address 10.0.0.7:31234" in others
    assert "train.search search.yaml seeds=[0] executor.kind=ray" in driver
    assert "executor.address=10.0.0.7:31234" in driver


def test_one_node_is_a_cluster_and_a_failed_search_is_not_requeued(
    cluster: dict[str, str],
) -> None:
    job = start({**cluster, "HOSTS": "node0\\n", "STEPS": "1", "DRIVER": "2"})
    job.communicate(timeout=30)
    assert job.returncode == 2
    calls = Path(cluster["CALLS"]).read_text()
    assert calls.count("srun") == 1 and "scontrol" not in calls


def test_before_its_time_is_over_the_driver_is_stopped_and_the_job_requeued(
    cluster: dict[str, str],
) -> None:
    job = start({**cluster, "DRIVER": ""})
    while "driver" not in wait_for(Path(cluster["CALLS"])):
        assert job.poll() is None
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 143 and "stopped by a signal; requeued" in said
    assert Path(cluster["CALLS"]).read_text().splitlines()[-1] == "scontrol requeue 71234"


def test_every_option_that_is_given_to_ray_exists() -> None:
    pytest.importorskip("ray")
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = SCRIPT.read_text()
    given = re.findall(r" (--[a-z-]+)", text[text.index("start --block") : text.index("asked=")])
    ours = {"--nodes", "--ntasks", "--nodelist", "--exclude"}  # of srun
    options = [option for option in given if option not in ours]
    assert len(options) >= 9
    assert [option for option in options if option not in known] == []
