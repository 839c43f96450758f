"""eval/child.py: a child process that is listened to, and that does not outlive an interruption."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest

from eval.child import follow
from eval.harness import MARK


def told(kind: str, **content: object) -> str:
    return f"print({MARK + json.dumps({'kind': kind} | content)!r}, flush=True)"


def test_the_harness_ends_when_this_process_is_interrupted(tmp_path):
    lines = [
        "import os, time",
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))",
        told("progress", done=1, total=2, note=""),
        "time.sleep(99)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with (tmp_path / "log").open("a") as log, pytest.raises(KeyboardInterrupt):
        follow(command, log, stop)
    assert time.monotonic() - start < 60
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_heartbeats_end_a_child_that_says_nothing(tmp_path):
    """Two seconds of silence, of 99: nothing but the heartbeat can notice."""
    pid = tmp_path / "pid"
    script = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(99)"
    beats = []

    def beat() -> None:
        beats.append(time.monotonic())
        if len(beats) > 1 and pid.exists():
            raise InterruptedError

    with (tmp_path / "log").open("a") as log, pytest.raises(InterruptedError):
        follow([sys.executable, "-c", script], log, None, beat)
    assert beats[1] - beats[0] > 0.5
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_with_heartbeats_nothing_is_lost(tmp_path):
    script = "\n".join(
        [
            "import sys",
            told("progress", done=1, total=2, note=""),
            "print('noise')",
            told("error", type="ValueError", message="why"),
            "sys.exit(2)",
        ]
    )
    seen = []
    with (tmp_path / "log").open("a") as log:
        code, error = follow(
            [sys.executable, "-c", script], log, lambda *told: seen.append(told), lambda: None
        )
    assert (code, error["message"], seen) == (2, "why", [(1, 2, "")])
    assert (tmp_path / "log").read_text() == "noise\n"


def test_a_child_is_none_of_the_ranks_that_a_launcher_started(tmp_path, monkeypatch):
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP")
    for name in launched:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with (tmp_path / "log").open("a") as log:
        follow([sys.executable, "-c", "import os; print(sorted(os.environ))"], log, None)
    said = (tmp_path / "log").read_text()
    assert not [name for name in launched if repr(name) in said]
    assert "OMP_NUM_THREADS" in said
