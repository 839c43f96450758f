"""Muon for matrices, AdamW for the rest, as one optimizer that a Trainer can hold.

Muon orthogonalises each matrix's update (Jordan et al., 2024; torch.optim.Muon). On models trained
from nothing it needs several times fewer steps than AdamW. Embeddings, heads, norms and biases
stay with AdamW. Updates are scaled so that both take the same learning rate (Moonlight,
arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

MATRIX = "matrix"
"""Key of a parameter group: true where Muon applies."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps groups with `matrix: True` by Muon and the others by AdamW.

    - `groups`: parameter groups, each with `params`, and optionally `matrix`, `lr`,
      `weight_decay` and names of one's own. A matrix group may hold 2-D parameters only.
    - `betas`, `eps`: of AdamW.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        listed = [dict(group) for group in groups]
        super().__init__(listed, {"lr": lr, "weight_decay": weight_decay, MATRIX: False})
        matrices = [group for group in self.param_groups if group[MATRIX]]
        others = [group for group in self.param_groups if not group[MATRIX]]
        self.inner: list[torch.optim.Optimizer] = []
        if matrices:
            self.inner.append(torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.inner.append(torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps))
        self._share()

    def _share(self) -> None:
        """One state, one set of groups: what a scheduler or a checkpoint sees is what steps."""
        held = {id(group["params"][0]): group for group in self.param_groups}
        for optimizer in self.inner:
            optimizer.param_groups = [held[id(g["params"][0])] for g in optimizer.param_groups]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.inner:
            optimizer.step()
        return loss


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon applies: a 2-D weight between hidden layers, no table and no output head."""
    tables = ("embed", "lm_head", "position", "pos_", "rel_pos", "class_embedding")
    return parameter.ndim == 2 and not any(word in name for word in tables)
