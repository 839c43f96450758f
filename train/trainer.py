"""One run from a model to a trained model: transformers' Trainer, and what it lacks.

It knows parts and learning rates, and no stage by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

from eagle_moe.checkpoint import Complete
from train.continuing import Continuing
from train.curve import score_batch
from train.data import NOT_FOR_THE_MODEL, EpochSampler, order_of
from train.ema import MovingAverage
from train.engines import Engine, EngineSteps
from train.health import FiniteSteps, HealthRules
from train.learning import frozen_modules, parameter_groups
from train.moved import MovedCheck
from train.muon import MuonWithAdamW
from train.recipe import Ema
from train.resume import ResumePoints
from train.throughput import TimedSteps


class StageTrainer(TimedSteps, FiniteSteps, Continuing, ResumePoints, Trainer):
    """Trains the parameters of `model` that require gradients.

    - `rates`: part -> learning rate.
    - `weight_decays`: part -> weight decay; `args.weight_decay` for parts that are not in it.
    - `layer_decays`: part -> factor per block; see `train.learning.parameter_groups`.
    - `mark`: what a resume point of this run is marked with; see `Complete`.
    - `muon`: optimise by `train.muon` instead of `args.optim`.
    - `engine`: how the model is spread over processes; default: whole, in one.
    - `ema`: keep a moving average of what learns; evaluation looks at that.
    - `health`: what to do about steps that go wrong.
    - `peak_tflops`: of one device, for MFU; see `TimedSteps`.
    - Other arguments as transformers' `Trainer` takes them.

    Frozen parts stay in evaluation mode.
    """

    optimizer: Any

    def __init__(
        self,
        rates: Mapping[str, float],
        mark: Complete,
        muon: bool = False,
        weight_decays: Mapping[str, float] | None = None,
        layer_decays: Mapping[str, float] | None = None,
        engine: Engine | None = None,
        ema: Ema | None = None,
        health: HealthRules | None = None,
        peak_tflops: float | None = None,
        **options: Any,
    ) -> None:
        self.muon = muon
        self.rates = dict(rates)
        self.weight_decays = dict.fromkeys(rates, options["args"].weight_decay)
        self.weight_decays |= weight_decays or {}
        self.layer_decays = dict(layer_decays or {})
        self.mark = mark
        self.engine = engine or Engine()
        self.moved = MovedCheck(self.engine)
        self._frozen: list[nn.Module] | None = None
        config = options["model"].config
        before = dict(config.__dict__)
        self.engine.spread(options["model"])
        super().__init__(rules=health or HealthRules(), peak_tflops=peak_tflops, **options)
        self.engine.adopt(self)
        # The Trainer writes use_cache = False into the config, which would be saved with the model.
        config.__dict__.pop("use_cache", None)
        config.__dict__.update({key: before[key] for key in before if key == "use_cache"})
        self.remove_callback(PrinterCallback)
        self.add_callback(self.moved)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.order = order_of(self.train_dataset, seed, step * self.args.world_size)
        if ema is not None:
            self.ema = MovingAverage(ema, self.engine, options["model"])
            self.add_callback(self.ema)
        self.add_callback(EngineSteps(self.engine))  # after the check, which looks at gradients

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
            groups = parameter_groups(
                model, self.rates, self.weight_decays, decayed, self.layer_decays
            )
            self.optimizer = cls(groups, **options)
            self.watch_optimizer(self.optimizer)
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
        told = {"use_cache": False, "skip_logits": True}
        inputs = {**self._with_image_tokens(inputs), **told}
        if seen := inputs.pop("seen", None):
            self.train_dataset.count(seen)
        return super().compute_loss(model, inputs, *args, **kw)

    def _with_image_tokens(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Go on from the experts' maps, if the batch has them instead of canvases."""
        maps = inputs.get("pixel_values")
        if not isinstance(maps, Mapping):
            return inputs
        with self.accelerator.autocast():  # which the model has around its forward alone
            image = self.model.get_image_features(maps, return_dict=True)
        rest = {key: value for key, value in inputs.items() if key != "pixel_values"}
        return {**rest, "mm_encoder_outputs": {"image": image}}

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        """An order that every number of processes and every resumed run agrees on."""
        return self.order

    # -- evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`, of the moving average if there is one.

        Leaves the random numbers of training alone.
        """
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        averaged = self.ema.in_place() if self.ema else nullcontext()
        with torch.random.fork_rng(devices=devices), averaged:
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and per sample whether it is right (given twice: the loop wants labels)."""
        with torch.no_grad():
            inputs = self._with_image_tokens(self._prepare_inputs(inputs))
            inputs = {
                name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL
            }
            loss, right = score_batch(model, inputs)
        return loss, right, right

    def floating_point_ops(self, inputs: Any) -> int:
        """None: the Trainer's estimate knows neither images nor frozen parts, and it costs time."""
        return 0

    # -- logs

    def _get_learning_rate(self) -> float:
        """The rate of the step that was just taken; also notes that of each part.

        The Trainer asks between step and schedule, which has gone on when it is logged.
        """
        self._part_rates: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            name = f"learning_rate_{group['part']}"  # layer decay: that of its last block
            self._part_rates[name] = max(float(group["lr"]), self._part_rates.get(name, 0.0))
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the learning rate of each part, and what happened to the samples used so far.

        The mean loss at the end is that of all steps that were taken, in whichever process.
        """
        if "train_loss" in logs:
            taken = self.state.global_step - self.health.counts["steps_nonfinite"]
            logs["train_loss"] = self._total_loss_scalar / taken if taken else math.nan
        if "learning_rate" in logs:
            logs |= self._part_rates
        counts = getattr(self.train_dataset, "counts", None)
        if "loss" in logs and counts is not None:
            if self.args.world_size > 1:
                self.train_dataset.share_counts(self.args.device)
            logs |= {f"samples_{name}": float(count) for name, count in counts().items()}
        super().log(logs, start_time)
