"""A moving average of the weights that learn, kept beside them; a stage may end in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from train.engines import Engine
from train.learning import learning_names
from train.recipe import Ema


class MovingAverage(TrainerCallback):
    """After every step: average = average + (1 - decay) * (weights - average), in float32.

    The decay begins small, (1 + step) / (10 + step), so that the average does not remember the
    weights that the run started from (TensorFlow's ExponentialMovingAverage with `num_updates`).
    A process averages what it holds: whole tensors, or its pieces under an engine that splits them.
    Under ZeRO 2 with bf16 the bfloat16 weights are averaged, not the float32 ones behind them.
    """

    def __init__(self, rule: Ema, engine: Engine, model: nn.Module) -> None:
        self.rule = rule
        self.engine = engine
        self.model = model
        self.values: dict[str, Tensor] = {}
        """Name of a tensor that learns -> its average, or this process's piece of it."""

    def decay(self, step: int) -> float:
        """Of the average after `step` steps."""
        return min(self.rule.decay, (1 + step) / (10 + step))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.values:  # else they were read from a resume point
            self.values = {name: self._place(value.clone()) for name, value in self._held().items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        weight = 1 - self.decay(state.global_step)
        for name, value in self._held().items():
            self.values[name].lerp_(self._place(value), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block the model has the averages for weights. Of no use under ZeRO 3."""
        held = self._held()
        own = {name: value.clone() for name, value in held.items()}
        self._set(held, self.values)
        try:
            yield
        finally:
            self._set(held, own)

    def whole(self) -> dict[str, Tensor]:
        """The averages as whole tensors on the CPU in process 0. All processes."""
        if self.engine.splits_weights:
            with self.in_place():
                return self.engine.gather(self.model, self.values)
        return {name: value.cpu() for name, value in self.values.items()} if _rank() == 0 else {}

    def save(self, folder: Path) -> None:
        """Write what this process averages into a resume point. All processes."""
        if _rank() == 0 or self.engine.splits_weights:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: value.cpu() for name, value in self.values.items()}, self._path(folder)
            )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, under the same engine and number of processes."""
        saved = load_file(self._path(folder))
        held = self._held()
        self.values = {n: value.to(self._place(held[n]).device) for n, value in saved.items()}

    def _path(self, folder: Path) -> Path:
        return folder / f"ema-{_rank() if self.engine.splits_weights else 0}.safetensors"

    def _held(self) -> dict[str, Tensor]:
        learning = learning_names(self.model)
        held = self.engine.held(self.model)
        return {name: held[name].detach() for name in held if name in learning}

    def _place(self, value: Tensor) -> Tensor:
        """In float32 where averages are kept."""
        return value.to("cpu" if self.rule.memory == "host" else value.device, torch.float32)

    @staticmethod
    def _set(held: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in held.items():
                value.copy_(values[name])


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
