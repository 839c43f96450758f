"""Programs that tests start and kill, and what must not be left of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start_program(folder: Path, source: str, log: Path | None = None) -> subprocess.Popen[str]:
    """Run `source`, which may import `tests` and use `out`, which is `folder`, by itself."""
    script = folder / "program.py"
    head = "import sys\nfrom pathlib import Path\n"
    path = f"sys.path.insert(0, {str(ROOT)!r})\nout = Path({str(folder)!r})\n"
    script.write_text(head + path + source)
    to = subprocess.PIPE if log is None else log.open("w")
    return subprocess.Popen([sys.executable, script], stdout=to, text=True)


def wait_for(path: Path, seconds: float = 120.0) -> str:
    """What is in the file, as soon as there is something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def assert_gone(pids: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, left


def marked(mark: str) -> dict[int, int]:
    """pid -> parent, of processes whose environment holds `mark` (NAME=value), but this one."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (place / "environ").read_bytes().split(b"\0"):
                found[int(place.name)] = int(
                    (place / "stat").read_text().rpartition(")")[2].split()[1]
                )
    found.pop(os.getpid(), None)
    return found


def jobs_of(runner: int, mark: str) -> list[int]:
    """Jobs and their keepers: what lives below the process that a runner forks them from."""
    found = marked(mark)
    roots = {pid for pid, parent in found.items() if parent == runner}
    return [p for p, parent in found.items() if parent in found and p not in {runner, *roots}]
