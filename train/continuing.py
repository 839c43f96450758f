"""Going on exactly: what the Trainer's resume points lack, and what it does not do on resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import DataLoader
from transformers import Trainer

from train.signals import EvaluationCut, shield_workers


class Continuing(Trainer):
    """A Trainer whose continued runs log and see what an uninterrupted one does.

    - The loss that is summed up since the last log line goes into the resume point of each process,
      and so does the state of `train_dataset` and of callbacks that are `Stateful`.
    - An evaluation that a request to stop has put off is made up for before the next step.
    - A run that was killed after its last step makes no other one.
    - The order of samples in later epochs is theirs when the run is continued within one.
    """

    evaluation_owed = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        return shield_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        return shield_workers(super().get_eval_dataloader(*args, **kwargs))

    def carried(self) -> dict[str, Stateful]:
        """What is kept in resume points beside weights, optimizer and random numbers."""
        named = [("data", self.train_dataset)]
        named += [(type(each).__name__, each) for each in self.callback_handler.callbacks]
        return {name: each for name, each in named if isinstance(each, Stateful)}

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        totals = {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "evaluation_owed": self.evaluation_owed,
            "carried": {name: each.state_dict() for name, each in self.carried().items()},
        }
        torch.save(totals, Path(output_dir, _name(self.args.process_index)))

    def _restore(self, point: Path) -> None:
        """Take up what the process with this number has left in `point`."""
        path = point / _name(self.args.process_index)
        totals = torch.load(path, map_location="cpu", weights_only=True)
        self._tr_loss.fill_(totals["loss"])
        self._total_loss_scalar = totals["total_loss"]
        self._globalstep_last_logged = totals["last_logged"]
        for name, each in self.carried().items():
            if name in totals["carried"]:
                each.load_state_dict(totals["carried"][name])
        if totals["evaluation_owed"] and self._determine_best_metric(
            self._evaluate(None, None), None
        ):
            self.state.best_model_checkpoint = str(point)

    def _run_epoch(self, **told: Any) -> None:
        point, epoch = told["resume_from_checkpoint"], told["epoch"]
        if point is not None and epoch == told["epochs_trained"]:
            self._restore(Path(point))
        if self.state.global_step >= self.state.max_steps:  # killed after its last step
            self.control.should_training_stop = True
            return
        # Here, because the loader that the Trainer makes to skip what was seen does not hand it on
        # to the sampler of several processes.
        if hasattr(told["train_dataloader"], "set_epoch"):
            told["train_dataloader"].set_epoch(epoch)
        super()._run_epoch(**told)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        except EvaluationCut:  # here, where the random numbers are those of training again
            self.evaluation_owed = True
            self._save_checkpoint(self.model_wrapped, None)
            self.callback_handler.on_save(self.args, self.state, self.control)
            raise AssertionError("a request to stop ends the run when it has saved") from None
        self.evaluation_owed = False
        return metrics


def _name(process: int) -> str:
    return f"totals_{process}.pt"
