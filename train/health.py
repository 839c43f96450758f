"""Steps that went wrong: they stop the run before they reach the weights."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import Trainer

from train.moved import TrainingFault


class FiniteSteps(Trainer):
    """A Trainer that a loss or gradient which is not finite stops."""

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
