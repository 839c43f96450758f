"""Tasks of the evaluation harness while a run trains: scores with cards, every so many steps.

The model of that step is written down, a process of its own answers and scores (`eval.run`, the
one path of scores), and training waits. What is trained is only read: weights, optimizer, random
numbers and modes are after an evaluation what they were before.

    WORKSPACE/tasks/step-000100/<task>/card.json, items.jsonl.gz      a score as any other
    WORKSPACE/tasks.jsonl                                             one row per metric and part
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from eagle_moe.checkpoint import replace_text
from eagle_moe.processor import EagleMixProcessor
from eagle_moe.scores.card import Card
from eagle_moe.scores.score import TOTAL
from eval.harness import Settings
from eval.run import LOG, check_data
from eval.run import run as run_harness
from eval.tasks.catalogue import expand
from train.curve import read_curve
from train.moved import TrainingFault
from train.recipe import TaskEvaluation
from train.save import TASK_CURVE, TASKS, gather_snapshot, write_snapshot
from train.signals import EvaluationCut, SaveAndStop
from train.sources import Origin
from train.stages import StageRun
from train.trainer import StageTrainer

FAILED = "failed"
"""In a row of the curve: why there is no score."""
NOT_RUN = "not_run"
"""In a row of the curve: why this one metric has no number, such as a judge without a key."""
MODEL = "model"
"""Folder of the model of a step, for as long as it is asked."""
Rows = list[dict[str, Any]]


def check_tasks(run: StageRun) -> None:
    """Raise `ValueError` or `FileNotFoundError` if the stage's `tasks` cannot be what they say.

    Names that there are not (with the nearest ones), and data that are not there.
    """
    told = run.stage.tasks
    if told is None:
        return
    where = f"stages.{run.name}: tasks"
    if any(lora.quantize for lora in run.lora.values()):
        raise ValueError(
            f"{where}: they need a second model, which weights in 4 bit (lora: quantize) cannot be "
            "given to. Use `eval`, or score the checkpoint when it is done."
        )
    try:
        check_data(expand(told.names), told.data, told.limit)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}: {error}") from None


class TaskScores(TrainerCallback):
    """Scores the stage's `tasks` every so many steps, and after the last one.

    All processes: the first one has the harness work; the others hear from it every second, so that
    nobody's patience ends. A run that is asked to stop ends the harness, whose answers are kept,
    and makes up for the evaluation when it goes on. `stop`: what saves and ends it then, called
    after this one. Other arguments as those of `train.save.write_snapshot`.
    """

    def __init__(
        self,
        told: TaskEvaluation,
        run: StageRun,
        trainer: StageTrainer,
        stop: SaveAndStop,
        processor: EagleMixProcessor,
        origins: Mapping[str, Origin],
        empty: Callable[[], Any],
    ) -> None:
        self.told = told
        self.run = run
        self.trainer = trainer
        self.stop = stop
        self.write = lambda tensors, folder: write_snapshot(
            run, trainer, processor, origins, empty, tensors, folder
        )
        self.path = run.workspace / TASK_CURVE
        self.tried = 0
        """The step that was last evaluated, or tried to be, in this process."""

    # -- when

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop what a killed process scored after the step from which this one continues."""
        rows = read_curve(self.path) if self.path.exists() else []
        kept = [row for row in rows if row["step"] <= state.global_step]
        done = any(row["step"] == state.global_step and FAILED not in row for row in kept)
        if self.trainer.engine.any(done and state.is_world_process_zero):
            self.tried = state.global_step
        if state.is_world_process_zero:
            _write_rows(self.path, kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._evaluate_if_due(state, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of a run that goes on: the step that it goes on from may be due still."""
        self._make_up(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of a run that goes on from its last step."""
        self._make_up(state, control)
        if state.is_world_process_zero:
            failed = sum(FAILED in row for row in read_curve(self.path))
            if failed:
                self._say(f"{failed} of its evaluations failed: see {TASK_CURVE}")

    def _make_up(self, state: Any, control: Any) -> None:
        if not self._evaluate_if_due(state, control):  # the resume point is as it was
            self.stop.signals.stop(f"{self.run.title}: still at step {state.global_step}")

    def _evaluate_if_due(self, state: Any, control: Any) -> bool:
        """False if it was due and a request to stop has cut it."""
        step = state.global_step
        due = step > 0 and (step % self.told.every == 0 or step >= state.max_steps)
        if not due or step == self.tried:
            return True
        self.tried = step
        try:
            with self.trainer.stopwatch.paused():
                rows, failure = self._evaluate(state)
        except EvaluationCut:
            return False
        if state.is_world_process_zero:
            self._keep(rows, control)
        self._stop_on(failure, step)
        return True

    def _keep(self, rows: Rows, control: Any) -> None:
        step = rows[0]["step"]
        before = [row for row in read_curve(self.path) if row["step"] != step]
        _write_rows(self.path, [*before, *rows])
        if scalars := dict(scalar for row in rows for scalar in _scalars(row)):
            logging = control.should_log
            self.trainer.log(scalars)
            control.should_log = logging  # the step's own line is still to come

    def _stop_on(self, failure: Exception | None, step: int) -> None:
        """All processes."""
        if self.told.on_failure == "stop" and self.trainer.engine.any(failure is not None):
            why = failure or "process 0 says why"
            raise TrainingFault(
                f"{self.run.title}: step {step}: its tasks were not scored: {why}\n"
                "The same command goes on from the last resume point. To train on without the "
                f"score: stages.{self.run.name}.tasks.on_failure=go_on."
            )

    # -- what

    def _evaluate(self, state: Any) -> tuple[Rows, Exception | None]:
        """Rows of the curve, in process 0, and why there are no scores. All processes."""
        tensors = gather_snapshot(self.trainer)
        if not state.is_world_process_zero:
            while not self.stop.waited(done=False):
                pass
            return [], None
        rows, failure = self._score(tensors, state.global_step)
        self.stop.waited(done=True)
        return rows, failure

    def _score(self, tensors: Mapping[str, Any], step: int) -> tuple[Rows, Exception | None]:
        folder = self.run.workspace / TASKS / f"step-{step:06d}"
        model = folder / MODEL
        try:
            self.write(tensors, model)
            cards = run_harness(self._settings(model, folder), heartbeat=self._beat)
        except (OSError, ValueError, RuntimeError) as error:
            self._beat()  # a request to stop may be what has ended the harness
            self._say(f"step {step}: ITS TASKS WERE NOT SCORED: {error}")
            return [{"step": step, FAILED: str(error)}], error
        finally:
            shutil.rmtree(model, ignore_errors=True)
        (folder / LOG).unlink(missing_ok=True)
        told = ", ".join(
            f"{name} {card.score.value:.3g}" for name, card in cards.items() if card.score
        )
        self._say(f"step {step}: {told or 'tasks answered'}")
        return [row for card in cards.values() for row in _rows(step, card)], None

    def _beat(self) -> None:
        self.stop.waited(done=False)

    def _settings(self, model: Path, out: Path) -> Settings:
        told = self.told.model_dump(exclude={"names", "every", "on_failure"})
        tasks = expand(self.told.names)
        return Settings(model=str(model), out=str(out), tasks=tasks, **told)

    def _say(self, text: str) -> None:
        print(f"{self.run.title}: {text}", file=sys.stderr, flush=True)


def _rows(step: int, card: Card) -> Rows:
    """`{"step", "task", "metric", "part", "value", "low", "high", "n"}`, one for each number."""
    numbers = [
        {"step": step, "task": card.task, "metric": metric, "part": part, **score.dump()}
        for metric, parts in card.metrics.items()
        for part, score in parts.items()
    ]
    gone = [
        {"step": step, "task": card.task, "metric": metric, NOT_RUN: why}
        for metric, why in card.not_run.items()
    ]
    return [*numbers, *gone]


def _scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What a row is in logs, TensorBoard among them."""
    if "value" in row:
        part = "" if row["part"] == TOTAL else f"_{row['part']}"
        yield f"eval_{row['task']}_{row['metric']}{part}", row["value"]


def _write_rows(path: Path, rows: Rows) -> None:
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
