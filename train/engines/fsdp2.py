"""FSDP2: every process holds a piece of each tensor and collects the rest when it is needed.

torch's `fully_shard` is applied here and not by accelerate, which on a CPU quietly makes DDP of it.
Each block of the language model and of the experts is a unit, so is each expert around its blocks;
embeddings, head, fusion and connector belong to the root, which is whole during a step.

A process without an image enters the units all the same, in the same order, forward and backward:
it calls them with an empty token instead of a picture. They collect their weights as always, and
return the token with gradients of zero attached, without computing anything. The order is taken
from a rehearsal on one blank picture at the start (`train.engines.rehearsal`).

In mixed precision, weights are collected as bfloat16 and gradients reduced as float32, while each
process keeps its piece of the weights in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import OPTIMIZER_NAME

from eagle_moe.parts import LANGUAGE_MODEL, model_tensors, part_blocks, part_of
from train.engines.imageless import ImagelessRanks, ZeroGradient
from train.engines.processes import ManyProcesses
from train.engines.rehearsal import Rehearsal, rehearse

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FROM_WHOLE = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class FSDP2(ManyProcesses):
    """Weights, gradients and optimizer state in pieces."""

    name = "fsdp2"
    splits_weights = True
    splits_optimizer = True
    joins_forward = True

    def check(self, args: TrainingArguments, dtype: str) -> None:
        self.device = args.device.type
        self.mixed = torch.bfloat16 if args.bf16 else None

    def spread(self, model: nn.Module) -> None:
        mesh = init_device_mesh(self.device, (self.processes,))
        policy = MixedPrecisionPolicy(
            param_dtype=self.mixed,
            reduce_dtype=torch.float32 if self.mixed else None,
            cast_forward_inputs=False,  # autocast decides, as it does everywhere else
        )
        towers = dict(model.model.vision_tower.towers.items())  # type: ignore[union-attr, operator]
        for name, expert in towers.items():
            for block in part_blocks(model, f"experts.{name}"):
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(expert, mesh=mesh, mp_policy=policy)
        for block in part_blocks(model, LANGUAGE_MODEL):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    def adopt(self, trainer: Trainer) -> None:
        prepare = trainer.accelerator.prepare_model
        # autocast, but no DDP around it
        trainer.accelerator.prepare_model = lambda model, **options: prepare(
            model, **{**options, "evaluation_mode": True}
        )

    def keep_in_step(self, model: nn.Module) -> ImagelessRanks:
        rehearsal = rehearse(model)
        model.reset_iter_state()  # type: ignore[operator]  # no backward pass follows
        return JoiningRanks(model, self.hosts, rehearsal)

    def held(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            name: value.to_local() if isinstance(value, DTensor) else value
            for name, value in model_tensors(model).items()
        }

    def gather(self, model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        tensors = model_tensors(model)
        whole = {}
        for name in tensors if names is None else names:
            value = tensors[name].detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if dist.get_rank() == 0:  # one tensor after the other: a device need not hold them all
                whole[name] = value.cpu()
        return whole

    def assign(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        own = model_tensors(model)
        with torch.no_grad():
            for name, value in tensors.items():
                target = own[name]
                if isinstance(target, DTensor):
                    value = value.to(target.device, target.dtype)
                    value = distribute_tensor(value, target.device_mesh, target.placements)
                target.copy_(value)

    def norm(self, value: Any) -> Any:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def save_optimizer(self, trainer: Trainer, folder: Path) -> None:
        state = get_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer, options=_WHOLE)
        if trainer.args.should_save:
            torch.save(state, folder / OPTIMIZER_NAME)

    def load_optimizer(self, trainer: Trainer, folder: Path) -> None:
        state: dict[str, Any] = {}
        if dist.get_rank() == 0:
            state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        set_optimizer_state_dict(
            trainer.model, trainer.optimizer.optimizer, state, options=_FROM_WHOLE
        )


class JoiningRanks(ImagelessRanks):
    """A process without an image goes through the experts' units with an empty token."""

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup, rehearsal: Mapping[str, Rehearsal]
    ) -> None:
        super().__init__(model, group, join_always=True, rehearsal=rehearsal)
        self.rehearsal = rehearsal
        for name, expert in self.experts.items():
            _answer_tokens(expert, self._join_expert(name, expert))
            for block in set(rehearsal[name].blocks):
                _answer_tokens(block, _join_unit(block))

    def fill_in(self, embeddings: Tensor) -> Tensor:
        token = embeddings.new_zeros(())
        tokens = [expert(token) for expert in self.experts.values()]
        rest = [
            parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and not part_of(name).startswith(("experts.", "language"))
        ]
        return ZeroGradient.apply(embeddings, *tokens, *rest)

    def _join_expert(self, name: str, expert: Any) -> Callable[[Tensor], Tensor]:
        rehearsal = self.rehearsal[name]
        inner = {id(p) for block in set(rehearsal.blocks) for p in block.parameters()}
        # by name: while a unit is entered, its parameters are other objects
        outer = {name for name, p in expert.named_parameters() if id(p) not in inner}

        def join(token: Tensor) -> Tensor:
            own = [p for name, p in expert.named_parameters() if name in outer and p.requires_grad]
            early = bool(rehearsal.needs_grad) and rehearsal.needs_grad[0]
            x = ZeroGradient.apply(token, *own) if early else token
            for block, needs_grad in zip(rehearsal.blocks, rehearsal.needs_grad, strict=True):
                y = expert.run_block(block, x if needs_grad else x.detach())
                x = y if needs_grad else ZeroGradient.apply(x, y)
            # a tensor of its own, as FSDP hangs the expert's backward pass on it
            return ZeroGradient.apply(x, *([] if early else own))

        return join


def _answer_tokens(module: Any, join: Callable[[Tensor], Tensor]) -> None:
    """Let `module` answer an empty token by `join`, and everything else as before.

    For good, not for a moment: activation checkpointing asks again in the backward pass.
    """
    forward = module.forward

    def answer(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 0:
            return join(args[0])
        return forward(*args, **kwargs)

    module.forward = answer


def _join_unit(block: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda token: ZeroGradient.apply(
        token, *[parameter for parameter in block.parameters() if parameter.requires_grad]
    )
