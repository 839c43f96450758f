"""Activation checkpointing by part: blocks forget their activations and compute them again.

transformers' own switch goes by training mode, which frozen parts are not in: it would leave the
activations of a frozen language model in memory, though the connector before it needs its
gradient. This one goes by whether there is a gradient at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from eagle_moe.parts import part_blocks


def recompute_blocks(model: nn.Module, parts: Iterable[str]) -> None:
    """From now on, the backward pass through `parts` recomputes each of their blocks.

    Gradients are the same, dropout included. What a block's own hooks do (sharding, for instance)
    is done once; names of modules and tensors stay as they are.
    """
    for part in parts:
        for block in part_blocks(model, part):
            block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
