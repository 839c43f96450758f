"""How fast a run is and where its time goes, in every log line. docs/monitoring.md has the keys."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from eagle_moe.loss import IGNORE_INDEX
from train.continuing import Continuing
from train.engines import Engine
from train.flops import Flops, model_flops, training_factors
from train.stopwatch import Stopwatch

DATA, EXPERTS, LANGUAGE_MODEL, OPTIMIZER, OTHER = ACTIVITIES = (
    "data",
    "experts",
    "language_model",
    "optimizer",
    "other",
)

COUNTS = ("steps", "samples", "images", "cached", "places", "tokens", "positions", "labels")

PEAK_TFLOPS = (
    (r"\bB200\b", 2250.0),
    (r"\bH[12]00 NVL\b", 835.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\b(G?H200|H[18]00)\b", 989.0),
    (r"\bA[18]00\b", 312.0),
    (r"\bL40S\b", 362.0),
    (r"\bL4\b", 121.0),
    (r"\bA40\b", 149.7),
    (r"\bA10\b", 125.0),
    (r"\bRTX A6000\b", 154.8),
    (r"\bRTX 4090\b", 165.2),
    (r"\bRTX 3090\b", 71.0),
)
"""bfloat16 TFLOP/s without sparsity, by what the card calls itself: NVIDIA's data sheets."""


def card_peak(name: str) -> float | None:
    """bfloat16 TFLOP/s of a card by its name, None if it is not known."""
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, name)), None)


class BatchCounts(Stateful):
    """What the batches of one process held. What is on a device stays there until it is asked for.

    `steps`, `samples`, `images`, `cached` images (whose maps were read from disk), `places` in
    rows, `tokens` in them, `positions` that these see, `labels`.
    """

    def __init__(self, pad_token_id: int | None) -> None:
        self.pad_token_id = pad_token_id
        self._reset()

    def _reset(self) -> None:
        self._known: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self._on_device: Tensor | None = None
        """(3,): tokens, positions, labels."""

    def add_step(self) -> None:
        """Count an optimizer step."""
        self._known["steps"] += 1

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count a batch as the model gets it."""
        ids, labels = batch["input_ids"], batch["labels"]
        held = {"samples": len(batch.get("sample_ids", ids)), "places": ids.numel()}
        if isinstance(batch.get("pixel_values"), Tensor):
            held["images"] = len(batch["pixel_values"])
        elif "mm_encoder_outputs" in batch:
            images = len(batch["mm_encoder_outputs"]["image"].pooler_output)
            held |= {"images": images, "cached": images}
        self._known.update(held)
        seen = positions_seen(batch, self.pad_token_id)
        counts = torch.stack([(seen > 0).sum(), seen.sum(), (labels[:, 1:] != IGNORE_INDEX).sum()])
        self._on_device = counts if self._on_device is None else self._on_device + counts

    def take(self) -> dict[str, int]:
        """All counts, which start again."""
        counts = self.state_dict()
        self._reset()
        return counts

    def state_dict(self) -> dict[str, int]:
        """All counts, which go on: also in another process, which loads them."""
        if self._on_device is not None:
            text = zip(("tokens", "positions", "labels"), self._on_device.tolist(), strict=True)
            self._known.update(dict(text))
            self._on_device = None
        return dict(self._known)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on with what was counted elsewhere."""
        self._reset()
        self._known.update(state_dict)


def positions_seen(batch: Mapping[str, Any], pad_token_id: int | None) -> Tensor:
    """How many positions each token sees under causal attention, itself included; 0 = padding.

    (B,L) int64. Packed rows have `position_ids` that restart with every sample and no mask; what
    follows the last sample is a segment of padding (`train.data.collator`).
    """
    ids: Tensor = batch["input_ids"]
    if (mask := batch.get("attention_mask")) is not None:
        return mask.cumsum(1) * mask
    positions = batch.get("position_ids")
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if positions is None:
        return places + 1
    if pad_token_id is None:
        return positions + 1
    start = torch.where(positions == 0, places, -1).amax(1, keepdim=True)
    last = places >= start
    padding = last & ((ids == pad_token_id) | ~last).all(1, keepdim=True)
    return torch.where(padding, 0, positions + 1)


class TimedSteps(Continuing):
    """A Trainer that says in every log line where the time went, and how much was done in it.

    - `peak_tflops`: of one device; default: what `card_peak` knows of it.

    Evaluation and saving do not count. Forward and backward passes are told apart by hooks on the
    vision tower and the language model; what lies between the two, and what waits for other
    processes at the end of a backward pass, counts as what the hooks saw last. A line that a kill
    has cut in two tells of both parts: what was done and timed since the line before is in the
    resume point.
    """

    engine: Engine

    def __init__(self, peak_tflops: float | None = None, **options: Any) -> None:
        self.factors = training_factors(options["model"])
        super().__init__(**options)
        self.stopwatch = Stopwatch(self.args.device)
        self.counts = BatchCounts(getattr(self.data_collator, "pad_token_id", None))
        self.peak_tflops = peak_tflops
        if peak_tflops is None and self.args.device.type == "cuda":
            self.peak_tflops = card_peak(torch.cuda.get_device_name(self.args.device))
        self._watch_parts()

    def carried(self) -> dict[str, Stateful]:
        return super().carried() | {"counts": self.counts, "stopwatch": self.stopwatch}

    def _watch_parts(self) -> None:
        """Hooks that see the two large parts begin and end, forward and backward."""
        model: Any = self.model.model

        def before_experts(*_: Any) -> None:
            self._switch(EXPERTS)

        def after_experts(module: nn.Module, args: Any, tokens: Tensor) -> None:
            self._switch(OTHER)
            self._switch_on_gradient(tokens, EXPERTS)

        def before_language_model(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._switch_on_gradient(kwargs["inputs_embeds"], OTHER)
            self._switch(LANGUAGE_MODEL)  # up to the loss

        model.vision_tower.register_forward_pre_hook(before_experts)
        model.vision_tower.register_forward_hook(after_experts)
        model.language_model.register_forward_pre_hook(before_language_model, with_kwargs=True)

    def _switch(self, activity: str) -> None:
        if self.stopwatch.activity is not None:  # neither evaluation nor someone else's call
            self.stopwatch.switch(activity)

    def _switch_on_gradient(self, value: Tensor, activity: str) -> None:
        if value.requires_grad and torch.is_grad_enabled():
            value.register_hook(lambda gradient: self._switch(activity))

    # -- what happens in a step

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        self.counts.add_step()
        return super().get_batch_samples(self._waiting(epoch_iterator), *args, **kwargs)

    def _waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.stopwatch.switch(DATA)
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.stopwatch.switch(OTHER)
            yield batch

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        self.counts.add(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._switch(LANGUAGE_MODEL)  # where the backward pass begins
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._switch(OTHER)
        return loss

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """See it step, also where an engine calls it."""
        optimizer.register_step_pre_hook(lambda *_: self._switch(OPTIMIZER))
        optimizer.register_step_post_hook(lambda *_: self._switch(OTHER))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.stopwatch.paused():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.stopwatch.paused():
            super()._save_checkpoint(*args, **kwargs)

    # -- what is told about it

    @cached_property
    def flops(self) -> Flops:
        """Operations of the model's forward pass, counted for the first log line."""
        return model_flops(self.model.config)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds time, throughput and MFU since the last line."""
        if "loss" in logs:
            logs |= self._throughput()
        super().log(logs, start_time)

    def _throughput(self) -> dict[str, float]:
        """Over all processes: counts are added up, times averaged."""
        own = {**dict.fromkeys(ACTIVITIES, 0.0), **self.stopwatch.lap(), **self.counts.take()}
        every = self.engine.collect(own)
        total = {key: sum(each[key] for each in every) for key in own}
        seconds = {activity: total[activity] / len(every) for activity in ACTIVITIES}
        passed, steps = sum(seconds.values()), total["steps"] / len(every)
        if not steps or not passed:
            return {}
        told = {f"time_{activity}": value / steps for activity, value in seconds.items()}
        told |= {"time_step": passed / steps}
        for name in ("samples", "images", "tokens", "labels"):
            told[f"{name}_per_second"] = total[name] / passed
        told["padding"] = 1 - total["tokens"] / total["places"]
        counted = ("images", "tokens", "positions", "labels", "cached")
        flops = self.flops.of_batch(self.factors, **{name: total[name] for name in counted})
        told["tflops_per_device"] = flops / passed / len(every) / 1e12
        if self.peak_tflops:
            told["mfu"] = told["tflops_per_device"] / self.peak_tflops
        return told
