"""What the parity tests share."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eagle_moe.experts import VisionExpert


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value that matters, and switch to eval.

    Library defaults can make a comparison empty: zero tables, gains of one, weights near zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(1.5 * noise * value[0].numel() ** -0.5)
            else:
                gain = 1.0 if name.endswith(("weight", "gamma", "lambda1")) else 0.0
                value.copy_(gain + 0.3 * noise)
        for name, value in module.named_buffers():
            if name.endswith("running_mean"):
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
            elif name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return module.eval()


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What the modules give out while the context lasts, and take in (`<name>.input`)."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output
            seen[f"{name}.input"] = args[0]

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def look(expert: VisionExpert, canvas: Tensor) -> Tensor:
    """Canvas -> map, without gradients."""
    with torch.no_grad():
        return expert(expert.view(canvas))


def distance(ours: Tensor, golden: Tensor) -> float:
    """Relative L2."""
    assert ours.shape == golden.shape, (ours.shape, golden.shape)
    ours, golden = ours.double(), golden.double()
    return ((ours - golden).norm() / golden.norm()).item()
