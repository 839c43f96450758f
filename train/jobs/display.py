"""What a person sees of a run: live bars in a terminal, lines with the time elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

PLAIN_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""


class Display(Protocol):
    """Told by the runner about what happens."""

    def say(self, text: str) -> None:
        """Print a line (or several) that stays."""

    def start(self, name: str, note: str) -> None: ...

    def report(self, name: str, done: float, total: float, note: str) -> None: ...

    def again(self, name: str, text: str) -> None:
        """The job was cut off and will be started again; `text` says how."""

    def end(self, name: str, text: str) -> None:
        """The job is over, well or not; `text` says how."""

    def refresh(self) -> None:
        """Called several times a second."""

    def close(self) -> None: ...


def open_display(title: str, total: int) -> Display:
    """The display for standard output as it is: a terminal or not."""
    console = Console()
    return LiveDisplay(title, total, console) if console.is_terminal else PlainDisplay(title, total)


class LiveDisplay:
    """A bar for all jobs and one for each that runs: the time it took and will take, its note."""

    def __init__(self, title: str, total: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
            console=console,
        )
        self._total = self._progress.add_task(
            f"[bold]{escape(title)}", total=total, note=f"{total} jobs"
        )
        self._bars: dict[str, TaskID] = {}
        self._progress.start()

    def say(self, text: str) -> None:
        self._progress.console.print(escape(text), highlight=False)

    def start(self, name: str, note: str) -> None:
        # Without a report a bar has no end and only moves.
        self._bars[name] = self._progress.add_task(
            f"  {escape(name)}", total=None, note=escape(note)
        )

    def report(self, name: str, done: float, total: float, note: str) -> None:
        self._progress.update(self._bars[name], completed=done, total=total, note=escape(note))

    def again(self, name: str, text: str) -> None:
        self._progress.remove_task(self._bars.pop(name))
        self.say(f"{name}: {text}")

    def end(self, name: str, text: str) -> None:
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name))
        self._progress.advance(self._total)
        self.say(f"{name}: {text}")

    def refresh(self) -> None:
        """Nothing to do: rich redraws from a thread of its own."""

    def close(self) -> None:
        self._progress.stop()


@dataclass
class _State:
    started: float = field(default_factory=time.monotonic)
    share: float | None = None
    note: str = ""

    def __str__(self) -> str:
        share = "" if self.share is None else f"{self.share:.0%} "
        note = f"{self.note}, " if self.note else ""
        passed = time.monotonic() - self.started
        left = f", about {passed / self.share - passed:.0f} s left" if self.share else ""
        return f"{share}({note}{passed:.0f} s{left})"


class PlainDisplay:
    """A line for each event, and a line about the running jobs every `PLAIN_EVERY` seconds."""

    def __init__(self, title: str, total: int) -> None:
        self._total = total
        self._done = 0
        self._running: dict[str, _State] = {}
        self._next = time.monotonic() + PLAIN_EVERY
        self.say(f"{title}: {total} jobs")

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    def start(self, name: str, note: str) -> None:
        self._running[name] = _State(note=note)

    def report(self, name: str, done: float, total: float, note: str) -> None:
        state = self._running[name]
        state.share = done / total if total else None
        state.note = note

    def again(self, name: str, text: str) -> None:
        del self._running[name]
        self.say(f"{name}: {text}")

    def end(self, name: str, text: str) -> None:
        self._running.pop(name, None)
        self._done += 1
        self.say(f"{self._done}/{self._total}  {name}: {text}")

    def refresh(self) -> None:
        if self._running and time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_EVERY
            jobs = "; ".join(f"{name} {state}" for name, state in self._running.items())
            self.say(f"{self._done}/{self._total}  running: {jobs}")

    def close(self) -> None:
        """Nothing is left open."""
