"""Muon for matrices, AdamW for the rest, as one optimizer that a Trainer can hold.

Muon orthogonalises each matrix's update (Jordan et al., 2024). On models trained from nothing it
needs several times fewer steps than AdamW. Embeddings, heads, norms and biases stay with AdamW.
Updates are scaled so that both take the same learning rate (Moonlight, arXiv 2502.16982,
section 2.2), as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` does. That one always rounds to
bfloat16, which processors without bfloat16 units emulate slowly: the mini models would spend a
fifth of their time on it. This one computes in the precision of the weights on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

MATRIX = "matrix"
"""Key of a parameter group: true where Muon applies."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
"""Of the quintic Newton-Schulz iteration (Jordan et al., 2024; the defaults of torch's Muon)."""
_RMS = 0.2
"""Root mean square of an AdamW update, which Muon's is scaled to (Moonlight, section 2.2)."""


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalisation, of 2-D parameters; decoupled weight decay."""

    def __init__(
        self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(gradient, 1 - momentum)
        update = orthogonalise(gradient.lerp(average, momentum))
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.add_(update, alpha=-lr * _RMS * max(parameter.shape) ** 0.5)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values come out between 0.7 and 1.2."""
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype)


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
            self.inner.append(Muon(matrices, lr=lr))
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
