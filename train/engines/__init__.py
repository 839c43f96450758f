"""How a run is spread over processes: one file per engine, `base` says what an engine does.

| `engine`                          | is                                                           |
|-----------------------------------|--------------------------------------------------------------|
| `auto`                            | nothing special in one process, `ddp` in several             |
| `ddp`                             | the whole model in every process                             |
| `zero2`, `zero3`, `zero3_offload` | DeepSpeed with `configs/deepspeed/<name>.json`               |
| `fsdp2`                           | weights, gradients and optimizer state in pieces, by torch   |
| path of a JSON file               | DeepSpeed with these settings                                |
"""

from __future__ import annotations

import os
from pathlib import Path

from eagle_moe.schema import nearest
from train.engines.base import Engine, EngineSteps, world_size
from train.engines.ddp import DDP
from train.engines.fsdp2 import FSDP2
from train.engines.zero import CONFIGS, Zero

AUTO = "auto"
ZERO = ("zero2", "zero3", "zero3_offload")
ENGINES = (AUTO, DDP.name, *ZERO, FSDP2.name)

__all__ = ["AUTO", "ENGINES", "Engine", "EngineSteps", "check_engine", "make_engine", "world_size"]


def check_engine(name: str) -> None:
    """Raises `ValueError` with the nearest engine if there is none of this name, or no file."""
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ValueError(f"no file {name}.")
    elif name not in ENGINES:
        raise ValueError(
            f'no engine "{name}".{nearest(name, ENGINES)} Or give a DeepSpeed JSON file.'
        )


def make_engine(name: str) -> Engine:
    """The engine of this name for the processes that were started.

    Raises `ValueError` if it has to be started by torchrun and was not.
    """
    check_engine(name)
    if name in (AUTO, DDP.name):
        return Engine() if world_size() == 1 else DDP()
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"engine: {name}: start it with torchrun --nproc_per_node N -m train.run ..., "
            "or say engine: auto."
        )
    if name == FSDP2.name:
        return FSDP2()
    return Zero(name, CONFIGS / f"{name}.json" if name in ZERO else Path(name))
