"""What the parity tests share."""

import torch
from torch import nn


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
