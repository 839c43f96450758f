"""Floating-point operations that training a model takes: what MFU is a share of.

One multiplication or one addition is one operation. Counted is what the model needs, whatever is
done on top: no activation is counted twice because it is computed again, no padding is counted, and
of causal attention only the half that is not masked.

- An image: experts, fusion and connector, as torch counts them on the meta device.
- A token: 2 per weight of the language model's linear layers, and 4 per channel of its queries,
  layer and position that it sees (2 for the scores, 2 for the values). Dense decoders only.
- A label: 2 per weight of the head, which sees no other positions (`eagle_moe.loss`).

A backward pass takes as much again for activations, in parts that gradients flow through, and once
more for weights, in so far as they learn: three times the forward pass where all is trained, twice
in a frozen language model above a connector that learns, once in frozen experts. The products
within attention have no weights, but gradients for both sides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eagle_moe.config import EagleMixConfig
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import CONNECTOR, LANGUAGE_MODEL, expert_part, part_of


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass."""

    image: Mapping[str, int]
    """Part -> operations per image: every expert, and the connector with the fusion."""
    token: int
    """Per token, in the language model's linear layers."""
    position: int
    """Per token and position that it sees (itself included), in attention."""
    label: int
    """Per label, in the head."""

    def of_batch(
        self,
        factors: Mapping[str, float],
        images: float,
        tokens: float,
        positions: float,
        labels: float,
        cached: float = 0,
    ) -> float:
        """Operations of forward and backward passes, by the factors of `training_factors`.

        `positions`: positions seen, summed over tokens. `cached`: of the `images`, those whose
        maps were read from disk.
        """
        text = factors[LANGUAGE_MODEL] * (self.token * tokens + self.label * labels)
        text += (3 if factors[LANGUAGE_MODEL] > 1 else 1) * self.position * positions
        seen = {part: images if part == CONNECTOR else images - cached for part in self.image}
        vision = sum(factors[part] * seen[part] * each for part, each in self.image.items())
        return vision + text


def model_flops(config: EagleMixConfig) -> Flops:
    """Count the operations of a model with this config; seconds at full size, the first time."""
    return _count(config.to_json_string(use_diff=False))


@lru_cache(maxsize=4)
def _count(config_json: str) -> Flops:
    config = EagleMixConfig.from_dict(json.loads(config_json))
    # a copy without weights: the model itself may be split, quantised or under adapters
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = EagleMixForConditionalGeneration(config).eval()
        size = config.vision_config.canvas_size
        canvas = torch.empty(1, 3, size, size, dtype=torch.uint8)
        with torch.no_grad():
            return Flops(_image_flops(model, canvas), *_text_flops(model))


def _image_flops(model: EagleMixForConditionalGeneration, canvas: torch.Tensor) -> dict[str, int]:
    towers: dict[str, Any] = dict(model.model.vision_tower.towers.items())
    counted, maps = {}, {}
    for name, expert in towers.items():
        with FlopCounterMode(display=False) as counter:
            maps[name] = expert(expert.view(canvas))
        counted[expert_part(name)] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model.model.get_image_features(maps)
    counted[CONNECTOR] = counter.get_total_flops()
    return counted


def _text_flops(model: EagleMixForConditionalGeneration) -> tuple[int, int, int]:
    decoder = model.model.language_model
    config = model.config.text_config
    weights = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Linear))
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    position = 4 * width * config.num_hidden_layers
    return 2 * weights, position, 2 * model.lm_head.weight.numel()


def training_factors(model: nn.Module) -> dict[str, float]:
    """Part -> operations of a training step as a multiple of its forward pass.

    To be asked before an engine splits the parameters.
    """
    total: dict[str, int] = {}
    learning: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        total[part] = total.get(part, 0) + parameter.numel()
        learning[part] = learning.get(part, 0) + parameter.requires_grad * parameter.numel()
    vision = any(count for part, count in learning.items() if part != LANGUAGE_MODEL)
    through = {CONNECTOR: vision, LANGUAGE_MODEL: any(learning.values())}
    return {
        part: 1 + through.get(part, count > 0) + count / max(total[part], 1)
        for part, count in learning.items()
    }
