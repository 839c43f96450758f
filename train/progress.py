"""Progress of a run, always visible: a bar in a terminal, lines in a log, a report to a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from train.jobs import progress

_SHOWN = {
    "loss": "loss",
    "eval_exact_match_total": "exact match",
    "samples_per_second": "samples/s",
}

WAITING = 0.1
"""Share of the time that is spent waiting for data above which it is shown."""


class ProgressReport(TrainerCallback):
    """Shows step, loss, exact match, samples/s and long waits for data of a run by its `title`."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.notes: dict[str, str] = {}
        self.console = Console(stderr=True)
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self.bar.add_task(
                self.title, total=state.max_steps, completed=state.global_step, note=""
            )
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        progress(state.global_step, state.max_steps, self.note)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step, note=self.note)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any
    ) -> None:
        news = {name: f"{logs[key]:.3g}" for key, name in _SHOWN.items() if key in logs}
        self.notes |= news
        if logs.get("time_step"):
            self.notes.pop("waiting for data", None)
            if (share := logs["time_data"] / logs["time_step"]) > WAITING:
                self.notes["waiting for data"] = f"{share:.0%}"
        if news and self.bar is None and state.is_world_process_zero:
            line = f"{self.title}: step {state.global_step}/{state.max_steps}, {self.note}"
            print(line, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; also called when training fails."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    @property
    def note(self) -> str:
        """The latest numbers, in a line."""
        return ", ".join(f"{name} {value}" for name, value in self.notes.items())
