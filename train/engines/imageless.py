"""A process without an image in its batch takes part in what the others do with theirs.

Collectives of several processes must match. If one of them trains experts on images and another has
text only, gradients of the experts are reduced on the one and missing on the other, and both wait
for ever. Feeding a blank picture to all experts would help and cost as much as a picture does.

Instead, where the language model receives its embeddings, which is where image tokens would have
been placed, `ZeroGradient` attaches every vision parameter that learns: the backward pass walks the
same way and gives each of them a gradient of zero, and no expert runs.

An engine that adds up gradients in the order in which they come (ZeRO) needs more: a gradient of
zero has to come when the others have the real one, or gradients of different parameters would be
added to each other, without a word. `gradient_order` finds the order out, on one blank picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eagle_moe.parts import LANGUAGE_MODEL, part_of
from train.engines.rehearsal import OrderCheck, Rehearsal
from train.moved import TrainingFault


class ZeroGradient(torch.autograd.Function):
    """`ZeroGradient.apply(x, *others)`: x; in the backward pass, others get a gradient of zero.

    As `x + 0 * sum(others)`, but nothing of the others is read, and an infinite one does no harm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        zeros = [
            torch.zeros(shape, dtype=dtype, device=device) if wanted else None
            for (shape, dtype, device), wanted in zip(ctx.others, needed, strict=True)
        ]
        return (gradients[0] if ctx.needs_input_grad[0] else None, *zeros)


class ImagelessRanks:
    """Hooks on `model` that count the calls of its experts and fill in for those that are missing.

    - `group`: for the roll call: before the language model runs, every process says how often each
      expert was run or filled in for. If that differs, all of them raise `TrainingFault` that names
      rank and expert, instead of waiting for each other in the backward pass.
    - `join_always`: fill in without gradients too, since forward passes have collectives.
    - `rehearsal`: with `join_always`, how experts go through their blocks; they are held to it.
    - `order`: what of vision learns, in the order in which gradients of zero shall come.

    Subclasses say what filling in for an expert means.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup,
        join_always: bool = False,
        rehearsal: Mapping[str, Rehearsal] | None = None,
        order: Sequence[nn.Parameter] | None = None,
    ) -> None:
        self.model = model
        self.group = group
        self.join_always = join_always
        self.order = order
        self.experts: dict[str, nn.Module] = dict(model.model.vision_tower.towers.items())  # type: ignore[union-attr, operator]
        self.calls = dict.fromkeys(self.experts, 0)
        """Expert -> how often it was run, or filled in for, with gradients on."""
        self._ran = False
        self._saw_image = False
        self._order_check = OrderCheck(self.experts, rehearsal) if rehearsal is not None else None
        for name, expert in self.experts.items():
            expert.register_forward_pre_hook(self._counter(name))
        # `prepend`: before the hooks by which an engine collects the language model's weights
        self.model.model.language_model.register_forward_pre_hook(  # type: ignore[union-attr]
            self._before_language_model, with_kwargs=True, prepend=True
        )

    def vision_parameters(self) -> list[nn.Parameter]:
        """Parameters that learn and that only an image gives a gradient to."""
        return vision_parameters(self.model)

    def saw_image(self) -> bool:
        """Whether this process had an image since it was last asked."""
        saw, self._saw_image = self._saw_image, False
        return saw

    def fill_in(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B,L,D) as they are, with vision attached to them. No expert runs."""
        self.calls = {name: count + 1 for name, count in self.calls.items()}
        if self.order is None:
            return ZeroGradient.apply(embeddings, *self.vision_parameters())
        for parameter in reversed(self.order):  # what is attached last comes first
            embeddings = ZeroGradient.apply(embeddings, parameter)
        return embeddings

    def _counter(self, name: str) -> Any:
        def count(module: nn.Module, args: Any) -> None:
            self._ran = True
            self.calls[name] += torch.is_grad_enabled()

        return count

    def _before_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        learning = torch.is_grad_enabled()
        if not self._ran and (learning or self.join_always):
            kwargs = {**kwargs, "inputs_embeds": self.fill_in(kwargs["inputs_embeds"])}
        elif learning:
            self._saw_image = True
        self._ran = False
        if self._order_check is not None:
            self._order_check.end_batch()
        if learning:
            self._roll_call()
        return args, kwargs

    def _roll_call(self) -> None:
        own = torch.tensor(list(self.calls.values()))
        every = [torch.empty_like(own) for _ in range(self.group.size())]
        try:
            dist.all_gather(every, own, group=self.group)
        except RuntimeError as error:
            raise TrainingFault(
                f"rank {dist.get_rank()}: was at the language model, where not all of the others "
                f"came in time (args.ddp_timeout): one has died, or hangs in an expert: {error}"
            ) from error
        for index, name in enumerate(self.experts):
            counts = [int(calls[index]) for calls in every]
            if len(set(counts)) > 1:
                usual = max(set(counts), key=counts.count)
                odd = [f"rank {rank}: {n}" for rank, n in enumerate(counts) if n != usual]
                raise TrainingFault(
                    f"experts.{name}: processes ran it a different number of times: "
                    f"{', '.join(odd[:8])}, the others: {usual}. They would wait for each other "
                    "for ever. An expert must be run once for all pictures of a batch."
                )


def vision_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of experts, fusion and connector that learn."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and part_of(name) != LANGUAGE_MODEL
    ]


def gradient_order(model: Any, device: torch.device, bf16: bool) -> list[nn.Parameter]:
    """What of vision learns, in the order in which a backward pass gives it gradients.

    Moves vision to `device`, where one blank picture goes through it. No gradient is left.
    """
    learning = vision_parameters(model)
    if not learning:
        return []
    order: list[nn.Parameter] = []

    def note(parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        order.append(parameter)
        parameter.grad = None  # at once: all of them together may not fit

    vision = [model.model.vision_tower, model.model.multi_modal_projector]
    modes = [module.training for module in vision]
    hooks = [parameter.register_post_accumulate_grad_hook(note) for parameter in learning]
    for module in vision:
        module.to(device).eval()  # neither random numbers nor statistics are touched
    size = model.config.vision_config.canvas_size
    blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        image = model.get_image_features(blank, return_dict=True)
    torch.cat(list(image.pooler_output)).sum().backward()
    for hook in hooks:
        hook.remove()
    for module, mode in zip(vision, modes, strict=True):
        module.train(mode)
    return order
