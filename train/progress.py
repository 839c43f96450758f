"""Progress of a run, always visible: a bar in a terminal, lines in a log, a report to a job."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from train.jobs import progress


class ProgressReport(TrainerCallback):
    """Shows step, loss and the last exact match of the run called `title`."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None
        self.notes: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                unit="step",
                dynamic_ncols=True,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        progress(state.global_step, state.max_steps, self._note())
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        for key, name in (("loss", "loss"), ("eval_exact_match_total", "exact match")):
            if key in logs:
                self.notes[name] = f"{logs[key]:.3g}"
        if self.bar is not None:
            self.bar.set_postfix_str(self._note())
        elif "loss" in logs or "eval_exact_match_total" in logs:
            print(f"{self.title}: step {state.global_step}/{state.max_steps}, {self._note()}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _note(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.notes.items())
