"""Jobs for a cluster in tests. This imports little, because the process of every job imports it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from train.jobs import progress

RANK = """
import json, os, sys
told = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")}
open(f"{sys.argv[1]}/rank{told['RANK']}.json", "w").write(json.dumps(told))
"""
DAEMON = "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(120)"


def leave_facts(out: Path) -> None:
    """RAY_RAYLET_PID tells which node a job is on."""
    names = ("RAY_RAYLET_PID", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    facts = {name: os.environ[name] for name in names}
    (out / "facts.json").write_text(json.dumps([facts, os.getpid(), time.time()]))


def look(out: Path) -> None:
    leave_facts(out)
    progress(1, 2, "half of it")
    time.sleep(1.5)


def torchrun(out: Path) -> None:
    leave_facts(out)
    (out / "rank.py").write_text(RANK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([sys.executable, *launch, out / "rank.py", out], check=True)


def wait_to_go(out: Path) -> None:
    """Adds a line for each run, starts something in a session of its own, ends when it may."""
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    told = [os.environ["RAY_RAYLET_PID"], os.getpid(), int(daemon.stdout.readline()), time.time()]
    with (out / "runs.txt").open("a") as file:
        file.write(json.dumps(told) + "\n")
    while not (out.parent / "go").exists():
        time.sleep(0.1)


def save_when_asked(out: Path) -> None:
    def save(*_: Any) -> None:
        (out / "saved.txt").write_text("saved")
        raise SystemExit(os.EX_TEMPFAIL)

    signal.signal(signal.SIGTERM, save)
    (out / "pid.txt").write_text(str(os.getpid()))
    time.sleep(120)


def note_gpus(out: Path, fail: bool = False) -> None:
    (out / "gpus.txt").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    assert not fail
