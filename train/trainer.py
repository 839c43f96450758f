"""One run from a model to a trained model: transformers' Trainer, and what it lacks.

It knows parts and learning rates, and no stage by name.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import rotate_checkpoints

from eagle_moe.checkpoint import Complete, write_checkpoint
from eagle_moe.parts import model_tensors, part_of
from train.curve import score_batch
from train.learning import frozen_modules, learning_names, learning_parts, parameter_groups
from train.moved import MovedCheck, TrainingFault
from train.muon import MuonWithAdamW

LEARNING = "learning.safetensors"
"""In a resume point: the tensors that the run changes. The rest is loaded as at its start."""


class StageTrainer(Trainer):
    """Trains the parameters of `model` that require gradients.

    - `rates`: part -> learning rate.
    - `mark`: what a resume point of this run is marked with; see `Complete`.
    - `muon`: optimise by `train.muon` instead of `args.optim`.
    - Other arguments as transformers' `Trainer` takes them.

    Frozen parts stay in evaluation mode. A loss or gradient that is not finite stops the run
    before it reaches the weights. Resume points appear whole or not at all.
    """

    optimizer: Any

    def __init__(
        self, rates: Mapping[str, float], mark: Complete, muon: bool = False, **options: Any
    ) -> None:
        self.muon = muon
        self.rates = dict(rates)
        self.mark = mark
        self.moved = MovedCheck()
        self._save_folder: Path | None = None
        self._frozen: list[nn.Module] | None = None
        config = options["model"].config
        before = dict(config.__dict__)
        super().__init__(**options)
        # The Trainer writes use_cache = False into the config, which would be saved with the model.
        config.__dict__.pop("use_cache", None)
        config.__dict__.update({key: before[key] for key in before if key == "use_cache"})
        self.remove_callback(PrinterCallback)
        self.add_callback(self.moved)

    # -- optimisation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group per part and decay rule, each with its part's learning rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, options = self._optimizer(model)
            if {"params", "model", "optimizer_dict"} & set(options):
                raise ValueError(
                    f"args.optim = {self.args.optim.value}: it groups parameters by itself, which "
                    "leaves no room for a learning rate per part. Choose another optimizer."
                )
            decayed = self.get_decay_parameter_names(model)
            groups = parameter_groups(model, self.rates, self.args.weight_decay, decayed)
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def _optimizer(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        if self.muon:
            return MuonWithAdamW, {}
        return self.get_optimizer_cls_and_kwargs(self.args, model)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kw: Any
    ) -> Any:
        # The loop has just put everything into training mode. Frozen parts rest: no dropout, no
        # moving statistics.
        if self._frozen is None:
            self._frozen = frozen_modules(self.model)
        for module in self._frozen:
            module.eval()
        self.moved.saw(inputs)
        inputs = {**self._with_image_tokens(inputs), "use_cache": False}
        return super().compute_loss(model, inputs, *args, **kw)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._check_finite("loss", loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        # Under fp16 an overflow is normal: the scaler skips the step and lowers its scale.
        if norm is not None and getattr(self.accelerator, "scaler", None) is None:
            self._check_finite("gradient norm", norm)
        return norm

    def _check_finite(self, what: str, value: Any) -> None:
        if not math.isfinite(float(value)):
            raise TrainingFault(
                f"step {self.state.global_step + 1}: the {what} is {float(value)}. The weights "
                "were not touched, and the last resume point is intact. Look at the data of this "
                "step, lower the learning rate, or train with a wider dtype."
            )

    def _with_image_tokens(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Go on from the experts' maps, if the batch has them instead of canvases."""
        maps = inputs.get("pixel_values")
        if not isinstance(maps, Mapping):
            return inputs
        with self.accelerator.autocast():  # which the model has around its forward alone
            image = self.model.get_image_features(maps, return_dict=True)
        rest = {key: value for key, value in inputs.items() if key != "pixel_values"}
        return {**rest, "mm_encoder_outputs": {"image": image}}

    # -- evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; leaves the random numbers of training alone."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and per sample whether it is right (given twice: the loop wants labels)."""
        with torch.no_grad():
            inputs = self._with_image_tokens(self._prepare_inputs(inputs))
            loss, right = score_batch(model, inputs)
        return loss, right, right

    def floating_point_ops(self, inputs: Any) -> int:
        """None: the Trainer's estimate knows neither images nor frozen parts, and it costs time."""
        return 0

    # -- logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the learning rate of each part, and what happened to samples so far."""
        if "learning_rate" in logs and self.optimizer is not None:
            for group in self.optimizer.param_groups:
                logs[f"learning_rate_{group['part']}"] = float(group["lr"])
        counts = getattr(self.train_dataset, "counts", None)
        if "loss" in logs and counts is not None:
            logs |= {f"samples_{name}": float(count) for name, count in counts().items()}
        super().log(logs, start_time)

    # -- resume points

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        target = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with self._draft(target):
            super()._save_checkpoint(model, trial)
            self._name_best(target)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

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
