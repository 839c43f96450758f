"""How much memory logits take at worst: the number behind `eagle_moe.loss`, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LogitMemory(TorchDispatchMode):
    """Follows the tensors (..., V) that operations make while this is active.

    `head`: the layer (D -> V) that makes logits. V must be no other width of the model, and D not
    the number of rows: tensors (D,V) are the gradient of the head's weight.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.vocabulary, self.width = head.out_features, head.in_features
        self.peak = 0
        """Bytes of such tensors that were alive together."""
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and self._is_logits(leaf.shape):
                self._follow(leaf.untyped_storage())
        self.peak = max(self.peak, sum(self._alive.values()))
        return out

    def _is_logits(self, shape: torch.Size) -> bool:
        return shape[-1:] == (self.vocabulary,) and shape != (self.width, self.vocabulary)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        """Count a storage once, whatever the number of views of it, until it is freed."""
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, key, None)


def peak_logit_bytes(step: Callable[[], Any], head: nn.Linear) -> int:
    """Largest number of bytes that logits and their gradients took at once during `step()`."""
    with LogitMemory(head) as memory:
        step()
    return memory.peak
