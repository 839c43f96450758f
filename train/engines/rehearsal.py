"""Experts go through their blocks as they did at the start, or are stopped before they do not.

Where weights are in pieces, processes collect those of a block together when they enter it. One
that enters another block, or enters one more often, would leave all of them waiting for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eagle_moe.parts import part_blocks
from train.moved import TrainingFault


@dataclass
class Rehearsal:
    """How one expert goes through its blocks: each call in order."""

    blocks: list[nn.Module] = field(default_factory=list)
    needs_grad: list[bool] = field(default_factory=list)
    """Whether what goes into the block depends on a parameter that learns. It decides when FSDP
    reduces the block's gradients: after the block's own backward pass, or at the end of all."""


def rehearse(model: nn.Module) -> dict[str, Rehearsal]:
    """Run the model on one blank picture, with gradients but without a step. All processes."""
    towers: dict[str, nn.Module] = dict(model.model.vision_tower.towers.items())  # type: ignore[union-attr, operator]
    seen = {name: Rehearsal() for name in towers}
    hooks = []
    for name in towers:
        for block in part_blocks(model, f"experts.{name}"):
            hooks.append(
                block.register_forward_pre_hook(_note(seen[name]), with_kwargs=True, prepend=True)
            )
    config: Any = model.config
    device = next(model.parameters()).device
    size = config.vision_config.canvas_size
    was_training = model.training
    model.eval()
    model(
        input_ids=torch.full((1, config.num_image_tokens), config.image_token_id, device=device),
        pixel_values=torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device),
        use_cache=False,
    )
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return seen


def _note(rehearsal: Rehearsal) -> Any:
    def note(block: nn.Module, args: Any, kwargs: Any) -> None:
        rehearsal.blocks.append(block)
        values = [*args, *kwargs.values()]
        rehearsal.needs_grad.append(any(isinstance(v, Tensor) and v.requires_grad for v in values))

    return note


class OrderCheck:
    """Hooks on experts that raise `TrainingFault`, naming rank and expert, where one leaves its
    rehearsal: before it enters another block, or when it is run a second time for one batch."""

    def __init__(
        self, experts: Mapping[str, nn.Module], rehearsals: Mapping[str, Rehearsal]
    ) -> None:
        self.rehearsals = rehearsals
        self._inside: str | None = None
        self._entered = 0
        self._done: set[str] = set()
        for name, expert in experts.items():
            expert.register_forward_pre_hook(self._enter(name), prepend=True)
            expert.register_forward_hook(self._leave)
            for block in set(rehearsals[name].blocks):
                block.register_forward_pre_hook(self._follow(name), with_kwargs=True, prepend=True)

    def end_batch(self) -> None:
        """All experts were run; those of the next batch may come."""
        self._done.clear()

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            if name in self._done:
                self._fault(name, "was run a second time for one batch")
            self._done.add(name)
            self._inside, self._entered = name, 0

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self._inside is not None
        if self._entered != len(self.rehearsals[self._inside].blocks):
            self._differs(self._inside)
        self._inside = None

    def _follow(self, name: str) -> Any:
        def follow(block: nn.Module, args: Any, kwargs: Any) -> None:
            if self._inside is None:
                return  # computed again in the backward pass
            order = self.rehearsals[name].blocks
            if self._entered >= len(order) or order[self._entered] is not block:
                self._differs(name)
            self._entered += 1

        return follow

    def _differs(self, name: str) -> None:
        self._fault(
            name,
            "went through its blocks in another order than at the start, or another number of "
            "times",
        )

    def _fault(self, name: str, what: str) -> None:
        raise TrainingFault(
            f"rank {dist.get_rank()}: experts.{name} {what}. Where weights are in pieces the other "
            "processes would wait for it for ever. An expert is run once for all pictures of a "
            "batch, and what it computes must not depend on them; if it has to, use engine: zero2."
        )
