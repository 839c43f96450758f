"""Does an expert keep the contract, and what does it cost? For any expert, plug-ins included."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eagle_moe.experts.base import ExpertSpec, VisionExpert
from eagle_moe.experts.registry import build_expert, resolve_expert
from eagle_moe.schema import apply_overrides

BF16_TOLERANCE = 0.1
"""Relative L2 between a bf16 and an fp32 pass. The official code itself moves by up to 0.016; a
wrong cast (positions, say) moves a map by more than this."""
FP32_TOLERANCE = 1e-4
"""Relative L2 between two fp32 passes that ought to agree (another batch, a compiled graph)."""
SPEED_SECONDS = 1.0
"""How long the speed is measured, at least; one pass if a pass takes longer."""


@dataclass(frozen=True)
class Finding:
    """One promise of the contract: kept or not, and what was seen."""

    promise: str
    kept: bool
    seen: str


@dataclass
class Report:
    """What `check_expert` found out about one expert."""

    spec: ExpertSpec
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(finding.kept for finding in self.findings)

    @property
    def failures(self) -> list[str]:
        return [f"{f.promise}: {f.seen}" for f in self.findings if not f.kept]


def check_expert(
    entry: str | Mapping[str, Any],
    overrides: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> Report:
    """Build an expert with random weights and hold it to the contract.

    `entry` is as `resolve_expert` takes it. `overrides` are `key=value` changes to it
    (`view.size=64`, `arch.layers=2`), so that a big expert can be checked shrunken; beside the
    entry's own keys, `canvas` sets the canvas's size (default: twice the view, so that there is
    something to resize) and `batch` the batch of the speed test (4). `device` defaults to the
    accelerator if there is one.

    Raises `ValueError` if the entry itself is wrong; whatever else fails is a finding.
    """
    given = {"preset" if ":" not in entry else "kind": entry} if isinstance(entry, str) else entry
    data = apply_overrides(dict(given), overrides)
    canvas_size, batch = data.pop("canvas", None), data.pop("batch", 4)
    spec = resolve_expert(data)
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    torch.manual_seed(0)
    expert = build_expert(spec).to(device or accelerator).eval()
    report = Report(spec)
    try:
        subject = _Subject(expert, canvas_size or 2 * spec.view.size, batch)
    except Exception as error:  # foreign code may fail in any way: a finding
        report.findings.append(Finding("gives a map", False, _sentence(error)))
        return report
    report.facts = subject.facts()
    for promise, test in subject.tests().items():
        try:
            kept, seen = test()
        except Exception as error:
            kept, seen = False, _sentence(error)
        report.findings.append(Finding(promise, kept, seen))
    return report


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["(no message)"]
    return f"{type(error).__name__}: {lines[0]}"


class _Subject:
    """An expert under test, with images for it."""

    def __init__(self, expert: VisionExpert, canvas_size: int, batch: int) -> None:
        self.expert, self.spec, self.batch = expert, expert.spec, batch
        self.device = next(expert.parameters()).device
        shape = (3, 3, canvas_size, canvas_size)
        self.canvas = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        with torch.no_grad():
            self.map = look(self.expert, self.canvas)

    def facts(self) -> dict[str, str]:
        card = self.spec.card
        millions = count_parameters(self.expert) / 1e6
        return {
            "map": f"{' x '.join(map(str, self.map.shape[1:]))} of a {self.spec.view.size} px view",
            "parameters": f"{millions:.2f} M in {len(self.expert.blocks)} blocks",
            "compute": f"{self.flops() / 1e9:.3g} GFLOP per image, forward",
            "speed": self.speed(),
            "licence": card.licence,
            "weights": card.checkpoint or "(none published)",
            "source": card.source,
        }

    def tests(self) -> dict[str, Callable[[], tuple[bool, str]]]:
        return {
            "map has the published shape": self.shape,
            "every parameter gets a gradient": self.gradients,
            "an image does not see its neighbours": self.neighbours,
            "works in bf16 and under autocast": self.bf16,
            "one graph, no host synchronisation": self.one_graph,
            "survives loading through the meta device": self.meta,
            "recomputed activations give the same gradients": self.checkpointing,
        }

    def shape(self) -> tuple[bool, str]:
        cells = self.spec.view.size // self.expert.stride
        wanted = (3, self.expert.channels, cells, cells)
        good = tuple(self.map.shape) == wanted and bool(self.map.isfinite().all())
        return good, f"{tuple(self.map.shape)}, published {wanted}, finite values"

    def gradients(self) -> tuple[bool, str]:
        self.backward()
        learning = {n: p.grad for n, p in self.expert.named_parameters() if p.requires_grad}
        dead = [n for n, grad in learning.items() if grad is None or not bool(grad.any())]
        wild = [n for n, grad in learning.items() if grad is not None and grad.isnan().any()]
        if dead or wild:
            return False, f"{len(dead)} without, {len(wild)} not a number: {(dead + wild)[:5]}"
        return True, f"{len(learning)} tensors"

    def neighbours(self) -> tuple[bool, str]:
        other = self.canvas.clone()
        other[1:] = 255 - other[1:]
        worst = 0.0
        for training in (False, True):  # dropout aside, a batch statistic shows only in training
            self.expert.train(training)
            maps = []
            for canvas in (self.canvas, other):
                torch.manual_seed(0)
                with torch.no_grad():
                    maps.append(look(self.expert, canvas)[:1])
            worst = max(worst, distance(*maps))
        self.expert.eval()
        with torch.no_grad():
            worst = max(worst, distance(look(self.expert, self.canvas[:1]), self.map[:1]))
        return worst < FP32_TOLERANCE, f"map moves by {worst:.1e}"

    def bf16(self) -> tuple[bool, str]:
        expert = self.copy().to(torch.bfloat16)
        with torch.no_grad():
            cast = look(expert, self.canvas)
            with torch.autocast(self.device.type, torch.bfloat16):
                mixed = look(self.expert, self.canvas)
        moved = [distance(seen.float(), self.map) for seen in (cast, mixed)]
        good = cast.dtype == torch.bfloat16 and max(moved) < BF16_TOLERANCE
        return good, f"moves by {moved[0]:.1%} in bf16, by {moved[1]:.1%} under autocast"

    def one_graph(self) -> tuple[bool, str]:
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda canvas: look(self.expert, canvas), fullgraph=True, backend="eager"
        )
        with torch.no_grad(), _HostWatch(self.device.type == "cuda") as watch:
            look(self.expert, self.canvas)
        with torch.no_grad():
            moved = distance(compiled(self.canvas), self.map)
        if watch.seen:
            return False, f"waits for the device: {', '.join(sorted(watch.seen))}"
        return moved < FP32_TOLERANCE, f"map moves by {moved:.1e} when traced"

    def meta(self) -> tuple[bool, str]:
        with torch.no_grad():
            moved = distance(look(self.copy(), self.canvas), self.map)
        return moved < FP32_TOLERANCE, f"map moves by {moved:.1e}"

    def checkpointing(self) -> tuple[bool, str]:
        plain = self.backward()
        switches: list[Any] = [
            module for module in self.expert.modules() if hasattr(module, "gradient_checkpointing")
        ]
        for module in switches:  # as PreTrainedModel.gradient_checkpointing_enable does it
            module._gradient_checkpointing_func = recompute
            module.gradient_checkpointing = True
        try:
            again = self.backward()
        finally:
            for module in switches:
                module.gradient_checkpointing = False
        moved = distance(again, plain)
        return (
            moved < FP32_TOLERANCE,
            f"{len(self.expert.blocks)} blocks, moved by {moved:.1e}",
        )

    def copy(self) -> VisionExpert:
        """The same expert as `from_pretrained` makes it: built on meta, given memory that holds
        garbage, filled from a state dict, the rest left to `init_weights`."""
        with torch.device("meta"):
            expert = build_expert(self.spec)
        expert.to_empty(device=self.device)
        for tensor in (*expert.parameters(), *expert.buffers()):
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
        expert.load_state_dict(self.expert.state_dict())
        for tensor in expert.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True
        expert.apply(expert.init_weights)  # type: ignore[arg-type]
        return expert.eval()

    def backward(self) -> Tensor:
        """Gradients of one training pass, all parameters in one vector."""
        torch.manual_seed(0)
        self.expert.train().zero_grad()
        seen = look(self.expert, self.canvas)
        (seen * torch.randn_like(seen)).mean().backward()
        self.expert.eval()
        grads = [p.grad.flatten() for p in self.expert.parameters() if p.grad is not None]
        return torch.cat(grads)

    def flops(self) -> float:
        from torch.utils.flop_counter import FlopCounterMode

        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            look(self.expert, self.canvas[:1])
        return counter.get_total_flops()

    def speed(self) -> str:
        canvas = self.canvas[:1].expand(self.batch, -1, -1, -1).contiguous()
        passes, start = 0, time.perf_counter()
        with torch.no_grad():
            while not passes or time.perf_counter() - start < SPEED_SECONDS:
                look(self.expert, canvas).flatten()[0].item()  # waits for the device
                passes += 1
        rate = passes * self.batch / (time.perf_counter() - start)
        where = f"{self.device}, {torch.get_num_threads()} threads" * (self.device.type == "cpu")
        return f"{rate:.3g} images/s forward, fp32, batch {self.batch}, {where or self.device}"


class _HostWatch(TorchDispatchMode):
    """Notes the operations whose result the host must wait for, on a CPU as well.

    On a GPU a synchronisation that is none of these is an error of its own.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.cuda, self.seen = cuda, set[str]()

    def __enter__(self) -> Self:
        if self.cuda:
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def look(expert: VisionExpert, canvas: Tensor) -> Tensor:
    """Canvas (B,3,S,S) -> map (B,C,h,w)."""
    return expert(expert.view(canvas))


def distance(ours: Tensor, other: Tensor) -> float:
    """Relative L2 distance; infinite if either has a value that is not finite."""
    moved = ((ours - other).norm() / other.norm()).item()
    return float("inf") if math.isnan(moved) else moved


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(function, *args, use_reentrant=False)


def count_parameters(expert: VisionExpert) -> int:
    return sum(p.numel() for p in expert.parameters())
