"""Several processes, one model: what DDP, FSDP2 and ZeRO have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from train.engines.base import Engine, world_size
from train.engines.imageless import ImagelessRanks

if TYPE_CHECKING:
    from transformers import Trainer


class ManyProcesses(Engine):
    """Keeps processes in step when some have images in their batch and some have not.

    What they tell each other about their steps goes through gloo, from host to host, so that no
    accelerator has to be waited for.
    """

    joins_forward = False
    """Whether a process must take part in collectives while others run an expert, not only in
    those of the backward pass."""

    @property
    def processes(self) -> int:
        return world_size()

    hosts: dist.ProcessGroup
    """The group for small messages; there when the engine is `ready`."""

    def ready(self, trainer: Trainer) -> None:
        assert trainer.model is not None
        group = dist.new_group(backend="gloo", timeout=trainer.args.ddp_timeout_delta)
        assert isinstance(group, dist.ProcessGroup)
        self.hosts = group
        self.imageless = self.keep_in_step(trainer.model)

    def keep_in_step(self, model: nn.Module) -> ImagelessRanks:
        """Have processes without an image do what the others wait for."""
        return ImagelessRanks(model, self.hosts, join_always=self.joins_forward)

    def end_step(self, model: nn.Module) -> None:
        """A step in which no process had an image leaves vision alone, as it does in one process.

        The zero gradients of `ImagelessRanks` would let momentum and weight decay go on.
        """
        if not self.any(self.imageless.saw_image()):
            for parameter in self.imageless.vision_parameters():
                parameter.grad = None

    def any(self, flag: bool) -> bool:
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.hosts)
        return bool(votes)

    def collect(self, value: Any) -> list[Any]:
        every = [None] * self.processes
        dist.all_gather_object(every, value, group=self.hosts)
        return every

    def union(self, names: Iterable[str]) -> set[str]:
        return {name for part in self.collect(sorted(names)) for name in part}
