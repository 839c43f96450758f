"""What the trainer asks of an engine. This one is the engine of a single process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME

from eagle_moe.parts import model_tensors

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def world_size() -> int:
    """Number of processes that a launcher such as torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Engine:
    """How a model is spread over processes. The base class leaves it whole, in one process.

    A trainer calls, in this order: `check`, `spread` (before the optimizer is made), `adopt` (it
    has an accelerator), `ready` (the model is wrapped, the optimizer made). Methods that say "all
    processes" are collective: every process calls them, in the same order.
    """

    name = "one process"
    splits_weights = False
    """Whether a process holds but a piece of each tensor while it trains."""
    splits_optimizer = False
    """Whether the optimizer sees pieces of the tensors that learn."""
    can_average = True
    """Whether pieces that stand in `held` are what `gather` puts together."""
    keeps_dtype = True
    """Whether weights keep the dtype in which they were loaded."""

    @property
    def processes(self) -> int:
        """How many processes train one model."""
        return 1

    @property
    def identity(self) -> dict[str, Any]:
        """What a resume point must have in common with the run that continues it, as JSON."""
        return {"engine": self.name, "processes": self.processes}

    @property
    def keeps_whole(self) -> bool:
        """Whether the model in each process is, all along, what a checkpoint would hold."""
        return self.keeps_dtype and not self.splits_weights

    # -- before the first step

    def arguments(self) -> dict[str, Any]:
        """What it changes in transformers' `TrainingArguments`, below what a stage gives."""
        return {}

    def check(self, args: TrainingArguments, dtype: str) -> None:
        """Raise `ValueError` if these arguments, or weights of this dtype, contradict it."""

    def spread(self, model: nn.Module) -> None:
        """Split the parameters of `model` in place, if that is what the engine does."""

    def adopt(self, trainer: Trainer) -> None:
        """Take what is needed of a trainer that was just made."""

    def ready(self, trainer: Trainer) -> None:
        """The model is wrapped and the optimizer made; no step was taken. All processes."""

    def leave_out(self, model: nn.Module) -> bool:
        """Keep the optimizer from the step whose gradients are there; whether it is kept from it.

        All processes.
        """
        model.zero_grad(set_to_none=True)  # optimizers pass over what has no gradient
        return True

    def end_step(self, model: nn.Module) -> None:
        """The gradients of a step are there, the optimizer comes next. All processes."""

    # -- what processes agree on

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process. All processes."""
        return flag

    def collect(self, value: Any) -> list[Any]:
        """What each process gives as `value`, in order of rank. All processes."""
        return [value]

    def union(self, names: Iterable[str]) -> set[str]:
        """The names of all processes together. All processes."""
        return set(names)

    # -- weights and gradients

    def held(self, model: nn.Module) -> dict[str, Tensor]:
        """The part of each of the model's tensors that this process holds."""
        return model_tensors(model)

    def gather(self, model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Whole tensors on the CPU (default: all) in process 0, nothing elsewhere. All processes.

        Parameters that learn come in the precision in which the optimizer keeps them.
        """
        tensors = self.held(model)
        if int(os.environ.get("RANK", "0")) != 0:
            return {}
        chosen = tensors if names is None else {name: tensors[name] for name in names}
        return {name: value.detach().cpu() for name, value in chosen.items()}

    def assign(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Set these tensors of the model to whole ones, which every process has."""
        own = model_tensors(model)
        with torch.no_grad():
            for name, value in tensors.items():
                own[name].copy_(value)

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether the backward passes of this step gave the parameter a gradient."""
        return parameter.grad is not None

    def optimized(self, optimizer: Any) -> set[int]:
        """`id` of every parameter of the model that the optimizer changes."""
        return {id(p) for group in optimizer.param_groups for p in group["params"]}

    def norm(self, value: Any) -> Any:
        """A gradient norm as a plain number or tensor. All processes."""
        return value

    # -- resume points

    def save_optimizer(self, trainer: Trainer, folder: Path) -> None:
        """Write the optimizer's state into a resume point. All processes."""
        if trainer.args.should_save:
            torch.save(trainer.optimizer.state_dict(), folder / OPTIMIZER_NAME)

    def load_optimizer(self, trainer: Trainer, folder: Path) -> None:
        """Read what `save_optimizer` wrote. All processes."""
        state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        trainer.optimizer.load_state_dict(state)


class EngineSteps(TrainerCallback):
    """Tells the engine of every optimizer step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any
    ) -> None:
        self.engine.end_step(model)
