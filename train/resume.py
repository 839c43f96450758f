"""Resume points: what a run changes, whole or not at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from eagle_moe.checkpoint import Complete, write_checkpoint, write_json
from eagle_moe.parts import model_tensors, part_of
from train.ema import MovingAverage
from train.engines import Engine
from train.learning import learning_names, learning_parts
from train.workspace import retire_points

LEARNING = "learning.safetensors"
"""In a resume point: the tensors that the run changes. The rest is loaded as at its start."""

ENGINE = "engine.json"
"""In a resume point: the engine and the number of processes that made it."""


class ResumePoints(Trainer):
    """A Trainer whose `checkpoint-N` folders appear complete or not at all, marked with `mark`.

    What `engine` holds in pieces is put together for them. What learns is in them once, and frozen
    parts are not in them at all.
    """

    mark: Complete
    engine: Engine
    ema: MovingAverage | None = None
    _save_folder: Path | None = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        target = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with self._draft(target):
            super()._save_checkpoint(model, trial)
            self._name_best(target)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = {target, *([Path(best)] if best else [])}
            retire_points(Path(self.args.output_dir), self.args.save_total_limit, keep)

    @contextlib.contextmanager
    def _draft(self, target: Path) -> Iterator[None]:
        """Let the Trainer write into a draft; process 0 completes it when all have written."""
        with contextlib.ExitStack() as stack:
            if self.args.should_save:
                self._save_folder = stack.enter_context(write_checkpoint(target, self.mark))
            else:
                self._save_folder = target.with_name(f".{target.name}.writing")
            self.accelerator.wait_for_everyone()
            try:
                yield
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    written = self._save_folder / target.name
                    for path in written.iterdir():
                        path.rename(self._save_folder / path.name)
                    written.rmdir()
            finally:
                self._save_folder = None
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return (
            super()._get_output_dir(trial) if self._save_folder is None else str(self._save_folder)
        )

    def _name_best(self, target: Path) -> None:
        """The best checkpoint may be the one being written: say where it will be."""
        best = self.state.best_model_checkpoint
        if best is not None and self._save_folder in Path(best).parents:
            self.state.best_model_checkpoint = str(target)
            if self.args.should_save:
                self.state.save_to_json(str(Path(best) / "trainer_state.json"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what the run changes, instead of the whole model. All processes."""
        assert output_dir is not None
        changing = self.engine.gather(self.model, changing_names(self.model))
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(
                {name: value.contiguous() for name, value in changing.items()},
                str(Path(output_dir) / LEARNING),
                metadata={"format": "pt"},
            )
            write_json(Path(output_dir) / ENGINE, self.engine.identity)
        if self.ema is not None:
            self.ema.save(Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.engine.save_optimizer(self, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    # -- continuing

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.engine.ready(self)
        if resume_from_checkpoint is not None:
            point = Path(resume_from_checkpoint)
            self._check_engine(point)
            self._load_learning(point)
            self.engine.load_optimizer(self, point)
            schedule = torch.load(point / SCHEDULER_NAME, weights_only=True)
            self.lr_scheduler.load_state_dict(schedule)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: `_prepare_for_training` does it, when the engine has the model."""

    def _check_engine(self, point: Path) -> None:
        """Raise `ValueError` if another engine or another number of processes made the point.

        Gradients would be added up in another order, each process would draw other random numbers,
        and the pieces of an optimizer would not fit: the run would not be the one that was begun.
        """
        made = json.loads((point / ENGINE).read_text(encoding="utf-8"))
        own = json.loads(json.dumps(self.engine.identity))
        if made != own:
            changed = [key for key in sorted({*made, *own}) if made.get(key) != own.get(key)]
            told = ", ".join(f"{key} {made.get(key)} -> {own.get(key)}" for key in changed)
            raise ValueError(
                f"{point}: cannot be continued exactly: {told}. Start the run as it was begun, or "
                "remove its folder to begin the stage anew."
            )

    def _load_learning(self, point: Path) -> None:
        saved = load_file(str(point / LEARNING))
        if faults := sorted(set(saved) ^ set(changing_names(self.model))):
            raise ValueError(
                f"{point}: made by a run in which other tensors learned: "
                f"{', '.join(faults[:5])}{' ...' if len(faults) > 5 else ''}."
            )
        self.engine.assign(self.model, saved)
        if self.ema is not None:
            self.ema.load(point)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_learning(Path(self.state.best_model_checkpoint))


def changing_names(model: nn.Module) -> list[str]:
    """What training can change: parameters that learn, and buffers of the parts they are in."""
    learning, open_parts = learning_names(model), learning_parts(model)
    parameters = {name for name, _ in model.named_parameters()}
    return [
        name
        for name in model_tensors(model)
        if name in learning or (name not in parameters and part_of(name) in open_parts)
    ]
