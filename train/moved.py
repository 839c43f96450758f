"""After the first step: what should have moved has moved, and nothing else.

It catches a part that is called trainable but sits behind `no_grad`, weights that are not in the
optimizer, and statistics or weights of frozen parts that change all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback

from eagle_moe.parts import LANGUAGE_MODEL, model_tensors, part_of, split_by_part, tensor_hashes
from train.learning import learning_names

logger = logging.getLogger(__name__)


class TrainingFault(RuntimeError):
    """Training itself went wrong, in a way that the message explains."""


class MovedCheck(TrainerCallback):
    """Compares hashes of all tensors before and after the first step with a learning rate above 0.

    Parts that look at images are judged by the first such step with an image in it. Raises
    `TrainingFault` that names tensors which moved but are frozen, tensors that learn but got no
    gradient, and parts in which nothing moved.
    """

    def __init__(self) -> None:
        self.start: dict[str, str] = {}
        """Hash of every tensor when training started."""
        self.has_image = False
        self._pending: set[str] = set()
        self._judged: set[str] = set()
        self._without_gradient: list[str] = []
        self._left_out: list[str] = []

    def saw(self, batch: Mapping[str, Any]) -> None:
        """Told of every batch, so that a step without images proves nothing about vision."""
        self.has_image |= "pixel_values" in batch

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any
    ) -> None:
        self.start = tensor_hashes(model_tensors(model))
        self._pending = set(split_by_part(learning_names(model)))

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **_: Any
    ) -> None:
        self._judged = set()
        if self._pending and any(group["lr"] > 0 for group in optimizer.param_groups):
            self._judged = {p for p in self._pending if self.has_image or p == LANGUAGE_MODEL}
        self.has_image = False
        if not self._judged:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        judged = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and part_of(name) in self._judged
        }
        self._left_out = [name for name, value in judged.items() if id(value) not in held]
        self._without_gradient = [name for name, value in judged.items() if value.grad is None]

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any
    ) -> None:
        if self._judged:
            now = tensor_hashes(model_tensors(model))
            self._judge({name for name, value in now.items() if value != self.start[name]}, model)
            self._pending -= self._judged
            self._judged = set()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._pending:
            logger.warning(
                "%s: trainable, but no batch had an image in it, so nothing was learned there.",
                ", ".join(sorted(self._pending)),
            )

    def check_frozen(self, model: nn.Module) -> None:
        """Raise `TrainingFault` if a frozen part is not, to the bit, what it was at the start."""
        now, learning = tensor_hashes(model_tensors(model)), learning_names(model)
        open_parts = set(split_by_part(learning))
        if strays := [
            name
            for name, value in now.items()
            if part_of(name) not in open_parts and value != self.start[name]
        ]:
            raise TrainingFault(f"frozen, but moved during the run: {_named(strays)}")

    def _judge(self, moved: set[str], model: nn.Module) -> None:
        learning = learning_names(model)
        parameters = {name for name, _ in model.named_parameters()}
        open_parts = set(split_by_part(learning))
        faults = []
        # Statistics of an open part (batch norm) may move along with its weights.
        if strays := [
            name
            for name in moved - learning
            if name in parameters or part_of(name) not in open_parts
        ]:
            faults.append(f"frozen, but moved: {_named(strays)}")
        if self._left_out:
            faults.append(f"trainable, but not in the optimizer: {_named(self._left_out)}")
        if self._without_gradient:
            faults.append(f"trainable, but got no gradient: {_named(self._without_gradient)}")
        for part in sorted(self._judged):
            if not any(part_of(name) == part for name in moved & learning):
                faults.append(
                    f"{part}: trainable, but nothing in it moved (if its weights are bfloat16, the "
                    "step may be smaller than their resolution: use dtype: float32 with args.bf16)"
                )
        if faults:
            raise TrainingFault("After the first step:\n" + "\n".join(faults))


def _named(names: list[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
