"""Steps that went wrong: they do not reach the weights, and the samples in them are written down.

`health.jsonl` in a run's workspace has one line per event:

    {"step": 1200, "event": "the loss is not finite", "action": "skipped", "loss": "nan",
     "gradient_norm": "nan", "data": ["data/train.jsonl"],
     "processes": [{"rank": 0, "losses": ["nan"], "sample_ids": [["7", "12"]]}]}

`losses` and `sample_ids` are those of each micro batch; `loss` is that of the whole step.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from transformers import Trainer, TrainerCallback
from transformers.training_args import ParallelMode

from eagle_moe.checkpoint import replace_text
from train.moved import MovedCheck, TrainingFault

if TYPE_CHECKING:
    from train.engines import Engine

logger = logging.getLogger(__name__)

HEALTH = "health.jsonl"
"""The file with the events of a run."""

WINDOW = 64
"""Steps over which the median is taken that a spike is measured by; at least a quarter of them."""


@dataclass(frozen=True)
class HealthRules:
    """What a stage says about steps that go wrong; see `train.recipe.Stage`."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite: int = 10
    spike_factor: float | None = 10.0


class HealthLog(TrainerCallback, Stateful):
    """Counts and records events; what it counted survives in resume points.

    `counts`: `steps_nonfinite` (all of them skipped), `steps_unlabelled` (no process had a label),
    `steps_spiked`.
    """

    def __init__(self, rules: HealthRules, path: Path) -> None:
        self.rules = rules
        self.path = path
        self.counts = dict.fromkeys(("steps_nonfinite", "steps_unlabelled", "steps_spiked"), 0)
        self.since_log = [0, 0]
        """Steps since the last log line, and how many of them were skipped."""
        self._recent: dict[str, deque[float]] = {}

    def spikes(self, values: Mapping[str, float]) -> list[str]:
        """Sentences on those of the values that lie far above what they were lately."""
        found = []
        for name, value in values.items():
            recent = self._recent.setdefault(name, deque(maxlen=WINDOW))
            usual = median(recent) if 4 * len(recent) >= WINDOW else math.inf
            if self.rules.spike_factor is not None and value > self.rules.spike_factor * usual:
                found.append(f"the {name} is {value:.4g}, {value / usual:.1f} times the median")
            recent.append(value)
        return found

    def write(self, row: Mapping[str, Any]) -> None:
        """Append an event."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop what a process wrote after the step from which this one continues."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= state.global_step]
        replace_text(self.path, "".join(kept))

    def state_dict(self) -> dict[str, Any]:
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"counts": self.counts, "since_log": self.since_log, "recent": recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts |= state_dict["counts"]
        self.since_log = list(state_dict["since_log"])
        recent = state_dict["recent"]
        self._recent = {name: deque(values, WINDOW) for name, values in recent.items()}


class FiniteSteps(Trainer):
    """A Trainer whose weights no loss or gradient that is not finite reaches.

    Every process judges every step by the same numbers, those of all processes, so that all of them
    stop, skip or go on together. A skipped step leaves weights, optimizer and schedule alone and
    counts as a step in all else, under every engine. A step without any label is taken, with
    gradients of zero: what momentum and weight decay do is part of the optimizer.
    """

    engine: Engine
    moved: MovedCheck

    def __init__(self, rules: HealthRules, **options: Any) -> None:
        self.health = HealthLog(rules, Path(options["args"].output_dir, HEALTH))
        self._micro_batches: list[tuple[list[str] | None, Tensor]] = []
        """Sample ids and loss of each micro batch of this step, in this process."""
        self._items: Tensor | int | None = None
        super().__init__(**options)
        self.add_callback(self.health)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        inputs = dict(inputs)
        ids = inputs.pop("sample_ids", None)
        self._items = kwargs.get("num_items_in_batch")
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._micro_batches.append((ids, loss.detach()))
        # An infinite loss may have finite gradients. These are not: they reach all processes, and
        # DeepSpeed, which takes its step before it can be judged here, leaves it out for them.
        return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # what is summed up for the log must stay finite; a step with such a loss is left out of it
        return super().training_step(*args, **kwargs).nan_to_num(0.0, 0.0, 0.0)

    def _get_grad_norm(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        norm = self.engine.norm(super()._get_grad_norm(model, *args, **kwargs))
        loss, norms, items = self._step_numbers(norm)
        self.health.since_log[0] += 1
        skipped = self._judge(model, loss, norms, items)
        # Of accelerate, by which the Trainer knows whether the schedule goes on. DeepSpeed's own
        # knows by itself, and so does that of fp16.
        if not self.is_deepspeed_enabled and self.accelerator.scaler is None:
            self.optimizer._is_overflow = skipped
        self._micro_batches.clear()
        return norm

    def _step_numbers(self, norm: Any) -> tuple[float, float, float]:
        """Loss, gradient norm and labels of the step over all processes; one wait for the device.

        A number that is not finite in one process is not finite here.
        """
        losses = torch.stack([loss.float() for _, loss in self._micro_batches]).sum()
        known = (0.0 if norm is None else norm, 1.0 if self._items is None else self._items)
        own = [losses, *(torch.as_tensor(x, device=losses.device).float() for x in known)]
        rows = torch.stack(own)[None]
        if self.args.parallel_mode == ParallelMode.DISTRIBUTED:
            rows = self.accelerator.gather(rows)
        loss, norm, items = rows.mean(0).tolist()
        return loss, norm, items

    def _judge(self, model: nn.Module, loss: float, norm: float, items: float) -> bool:
        """Whether the step is skipped. Raises `TrainingFault` if the run must not go on."""
        fp16 = self.accelerator.mixed_precision == "fp16"  # where an overflow is normal
        if not math.isfinite(loss) or not (fp16 or math.isfinite(norm)):
            self._not_finite(loss, norm, self.engine.leave_out(model))
            return True
        if items == 0:
            self.moved.idle = True
            self._tell("unlabelled", "no sample of it has a token to learn from", loss, norm)
        elif found := self.health.spikes({"loss": loss, "gradient norm": norm}):
            self._tell("spiked", "; ".join(found), loss, norm)
        return False

    def _not_finite(self, loss: float, norm: float, left_out: bool) -> None:
        rules, counts = self.health.rules, self.health.counts
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        too_many = counts["steps_nonfinite"] >= rules.max_nonfinite
        event = f"the {what} is {value}"
        if left_out and rules.on_nonfinite == "skip" and not too_many:
            self._tell("nonfinite", event, loss, norm, "skipped")
            self._forget_step()
            return
        named = self._tell("nonfinite", event, loss, norm, "stopped" if left_out else "taken")
        told = f"step {self.state.global_step + 1}: {event}"
        seen = f"The samples of this step are in {self.health.path}{named}."
        if not left_out:
            raise TrainingFault(
                f"{told}. engine: {self.engine.name} took the step all the same: the weights in "
                f"memory are lost, the last resume point is intact. {seen}"
            )
        remedy = "leave such steps out with `on_nonfinite: skip`"
        if rules.on_nonfinite == "skip":
            told += f", and {rules.max_nonfinite} steps were skipped already (max_nonfinite)"
            remedy = "raise max_nonfinite"
        raise TrainingFault(
            f"{told}. The weights were not touched, and the last resume point is intact. {seen} "
            f"Look at them, lower the learning rate, train in a wider dtype, or {remedy}."
        )

    def _tell(self, kind: str, event: str, loss: float, norm: float, action: str = "taken") -> str:
        """Count and record an event of this step; some of its samples, for a message."""
        self.health.counts[f"steps_{kind}"] += 1
        batches = self._micro_batches
        own = {
            "rank": self.args.process_index,
            "losses": [_number(value.item()) for _, value in batches],
            "sample_ids": [ids for ids, _ in batches],
        }
        step = self.state.global_step + 1
        parts = getattr(self.train_dataset, "parts", ())
        row = {
            "step": step,
            "event": event,
            "action": action,
            "loss": _number(loss),
            "gradient_norm": _number(norm),
            "data": [part.spec.path for part in parts],
            "processes": self.engine.collect(own),
        }
        ids = [name for p in row["processes"] for batch in p["sample_ids"] for name in batch or ()]
        named = f" ({', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''})" if ids else ""
        if self.args.process_index == 0:
            self.health.write(row)
            logger.warning(
                "step %d: %s; %s. Samples: %s%s", step, event, action, self.health.path, named
            )
        return named

    def _forget_step(self) -> None:
        """What was left out of the weights is left out of the log, and proves nothing."""
        self.moved.idle = True
        self.health.since_log[1] += 1
        losses = torch.stack([loss for _, loss in self._micro_batches])
        self._tr_loss -= losses.nan_to_num(0.0, 0.0, 0.0).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what went wrong so far. The loss is the mean of the steps that were taken."""
        if "loss" in logs:
            steps, skipped = self.health.since_log
            if skipped:
                taken = steps - skipped
                logs["loss"] = logs["loss"] * steps / taken if taken else math.nan
            self.health.since_log = [0, 0]
            logs |= {name: float(count) for name, count in self.health.counts.items()}
        super().log(logs, start_time)


def _number(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
