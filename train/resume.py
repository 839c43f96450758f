"""Resume points: what a run changes, whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from eagle_moe.checkpoint import Complete, write_checkpoint
from eagle_moe.parts import model_tensors, part_of
from train.learning import learning_names, learning_parts
from train.workspace import retire_points

LEARNING = "learning.safetensors"
"""In a resume point: the tensors that the run changes. The rest is loaded as at its start."""


class ResumePoints(Trainer):
    """A Trainer whose `checkpoint-N` folders appear complete or not at all, marked with `mark`."""

    mark: Complete
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

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what the run changes, instead of the whole model."""
        if self.args.should_save:
            assert output_dir is not None
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            changing = changing_tensors(self.model)
            save_file(
                {name: value.detach().contiguous().cpu() for name, value in changing.items()},
                str(Path(output_dir) / LEARNING),
                metadata={"format": "pt"},
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(str(Path(resume_from_checkpoint) / LEARNING))
        changing = changing_tensors(self.model)
        if faults := sorted(set(saved) ^ set(changing)):
            raise ValueError(
                f"{resume_from_checkpoint}: made by a run in which other tensors learned: "
                f"{', '.join(faults[:5])}{' ...' if len(faults) > 5 else ''}."
            )
        with torch.no_grad():
            for name, value in changing.items():
                value.copy_(saved[name])

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training can change: parameters that learn, and buffers of the parts they are in."""
    learning, open_parts = learning_names(model), learning_parts(model)
    parameters = {name for name, _ in model.named_parameters()}
    return {
        name: value
        for name, value in model_tensors(model).items()
        if name in learning or (name not in parameters and part_of(name) in open_parts)
    }
