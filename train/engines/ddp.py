"""DDP: every process holds the whole model, gradients are averaged.

`find_unused_parameters`, transformers' default, walks the autograd graph before each backward pass
to find what a process without an image did not use. Nothing is unused here: where no image is,
`train.engines.imageless` gives vision a gradient of zero, and what never gets a gradient is refused
after the first step (`train.moved`). So the choice is static.
"""

from __future__ import annotations

from typing import Any

from train.engines.processes import ManyProcesses


class DDP(ManyProcesses):
    """torch's DistributedDataParallel, by way of accelerate."""

    name = "ddp"

    def arguments(self) -> dict[str, Any]:
        return {"ddp_find_unused_parameters": False}
