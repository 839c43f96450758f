"""After the first step: what should have moved has moved, and nothing else.

It catches a part that is called trainable but sits behind `no_grad`, weights that are not in the
optimizer, and statistics or weights of frozen parts that change all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from eagle_moe.parts import LANGUAGE_MODEL, part_of, split_by_part, tensor_hashes
from train.learning import learning_names

if TYPE_CHECKING:
    from train.engines import Engine

logger = logging.getLogger(__name__)


class TrainingFault(RuntimeError):
    """Training itself went wrong, in a way that the message explains."""


class MovedCheck(TrainerCallback):
    """Compares hashes of all tensors before and after the first step with a learning rate above 0.

    Parts that look at images are judged by the first such step with an image in it. Raises
    `TrainingFault` that names tensors which moved but are frozen, tensors that learn but got no
    gradient, and parts in which nothing moved. Of several processes each looks at what it holds,
    and all of them come to the same verdict.

    A process without an image gets gradients of zero in vision (`train.engines.imageless`), which
    cannot be told from real ones once they are added up: what gets none is found for certain only
    where every process had an image.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.start: dict[str, str] = {}
        """Hash of every tensor when training started."""
        self.has_image = False
        self.idle = False
        """Set before a step that is left out, or has nothing to learn from: it proves nothing."""
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
        self.start = tensor_hashes(self.engine.held(model))
        more = state.global_step < state.max_steps  # else it was killed after its last step
        self._pending = set(split_by_part(learning_names(model))) if more else set()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **_: Any
    ) -> None:
        self._judged = set()
        idle, self.idle = self.idle, False
        if self._pending and not idle and any(g["lr"] > 0 for g in optimizer.param_groups):
            has_image = self.engine.any(self.has_image)
            self._judged = {p for p in self._pending if has_image or p == LANGUAGE_MODEL}
        self.has_image = False
        if not self._judged:
            return
        held = self.engine.optimized(optimizer)
        judged = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and part_of(name) in self._judged
        }
        self._left_out = [name for name, value in judged.items() if id(value) not in held]
        self._without_gradient = [
            name for name, value in judged.items() if not self.engine.has_gradient(value)
        ]

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any
    ) -> None:
        if self._judged:
            self._judge(self._moved(model), model)
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
        open_parts = set(split_by_part(learning_names(model)))
        if strays := [name for name in self._moved(model) if part_of(name) not in open_parts]:
            raise TrainingFault(f"frozen, but moved during the run: {_named(strays)}")

    def _moved(self, model: nn.Module) -> set[str]:
        """Tensors that are not what they were at the start, in any process."""
        now = tensor_hashes(self.engine.held(model))
        return self.engine.union(name for name, value in now.items() if value != self.start[name])

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
        if left_out := self.engine.union(self._left_out):
            faults.append(f"trainable, but not in the optimizer: {_named(left_out)}")
        if without_gradient := self.engine.union(self._without_gradient):
            faults.append(f"trainable, but got no gradient: {_named(without_gradient)}")
        for part in sorted(self._judged):
            if not any(part_of(name) == part for name in moved & learning):
                faults.append(
                    f"{part}: trainable, but nothing in it moved (if its weights are bfloat16, the "
                    "step may be smaller than their resolution: use dtype: float32 with args.bf16)"
                )
        if faults:
            raise TrainingFault("After the first step:\n" + "\n".join(faults))


def _named(given: Iterable[str]) -> str:
    names = sorted(given)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
