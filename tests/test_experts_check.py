"""`experts check` passes what keeps the contract and names the promise that is broken."""

import io

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from eagle_moe.experts import VisionExpert, check, presets, resolve_expert
from eagle_moe.experts.base import ExpertSpec
from eagle_moe.experts.commands import check_command, list_command
from eagle_moe.experts.registry import EXPERTS, register_expert

CARD = {"checkpoint": "", "licence": "unknown", "source": "test"}
ENTRY = {"kind": "sound", "view": {"size": 16}, "card": CARD}


def shortened(name: str) -> dict:
    """The preset with one layer, where it says `layers`: tracing is what takes time here."""
    arch = {"layers": 1} if "layers" in resolve_expert(name).arch else {}
    return {"preset": name, "arch": arch}


SWEEP = [
    *(shortened(name) for name in sorted(presets()) if name.endswith("-tiny")),
    {
        "kind": "timm:eva02_tiny_patch14_224",  # has non-persistent buffers
        "view": {"size": 56},
        "arch": {"options": {"depth": 1}},
    },
    {
        "kind": "timm:resnet18",  # has BatchNorm
        "view": {"size": 64},
        "arch": {"options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}},
    },
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(check, "SPEED_SECONDS", 0.0)


@pytest.mark.parametrize("entry", SWEEP, ids=lambda e: e.get("preset", e.get("kind")))
def test_every_expert_keeps_the_contract(entry):
    report = check.check_expert(entry, device="cpu")
    assert report.passed, report.failures
    assert len(report.findings) == 7


class Sound(VisionExpert):
    """Keeps every promise; the subclasses below break one each."""

    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__(spec)
        self.channels, self.stride = 8, 4
        self.stem = nn.Conv2d(3, 8, 4, stride=4)

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.stem]

    def forward(self, view: Tensor) -> Tensor:
        return self.run_block(self.stem, view)


class WrongShape(Sound):
    def forward(self, view: Tensor) -> Tensor:
        return super().forward(view)[..., :-1]


class Unused(Sound):
    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__(spec)
        self.head = nn.Linear(8, 2)


class BatchStatistics(Sound):
    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__(spec)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, view: Tensor) -> Tensor:
        return self.norm(super().forward(view))


class LostPrecision(Sound):
    def forward(self, view: Tensor) -> Tensor:
        x = super().forward(view)
        return x + (1000.0 * x.double()).sin().to(x.dtype)


class HostRoundTrip(Sound):
    def forward(self, view: Tensor) -> Tensor:
        return super().forward(view) * view.abs().max().item()


class HiddenBuffer(Sound):
    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__(spec)
        self.register_buffer("table", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, view: Tensor) -> Tensor:
        return super().forward(view) * self.table[:, None, None]


class NotRepeatable(Sound):
    calls = 0

    def forward(self, view: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(view) * (1 + self.calls % 2 * self.training)


BROKEN = {
    WrongShape: "map has the published shape",
    Unused: "every parameter gets a gradient",
    BatchStatistics: "an image does not see its neighbours",
    LostPrecision: "works in bf16 and under autocast",
    HostRoundTrip: "one graph, no host synchronisation",
    HiddenBuffer: "survives loading through the meta device",
    NotRepeatable: "recomputed activations give the same gradients",
}


@pytest.fixture
def register():
    """Register a class as kind `sound` for the length of a test."""

    def add(cls):
        EXPERTS._classes.pop("sound", None)
        register_expert("sound")(cls)

    yield add
    EXPERTS._classes.pop("sound", None)


def test_sound_expert_passes(register):
    register(Sound)
    report = check.check_expert(ENTRY, device="cpu")
    assert report.passed, report.failures


@pytest.mark.parametrize(
    ("cls", "promise"), BROKEN.items(), ids=lambda v: getattr(v, "__name__", "")
)
def test_a_broken_promise_is_named(register, cls, promise):
    register(cls)
    report = check.check_expert(ENTRY, device="cpu")
    assert promise in [finding.promise for finding in report.findings if not finding.kept]


def test_expert_that_raises_is_a_finding(register):
    class Raises(Sound):
        def forward(self, view: Tensor) -> Tensor:
            raise RuntimeError("no eyes")

    register(Raises)
    report = check.check_expert(ENTRY, device="cpu")
    assert report.failures == ["gives a map: RuntimeError: no eyes"]


def test_command_prints_and_returns_the_exit_code(register):
    out = io.StringIO()
    console = Console(file=out, width=120)
    assert check_command(["clip-tiny", "arch.layers=1", "canvas=40", "batch=2"], console) == 0
    assert "keeps the contract" in out.getvalue()
    assert "in 1 blocks" in out.getvalue()
    register(WrongShape)
    EXPERTS["sound"].presets = {"sound": {"view": {"size": 16}, "card": CARD}}
    assert check_command(["sound"], console) == 1
    assert "breaks the contract" in out.getvalue()
    with pytest.raises(ValueError, match='no expert "clipp". Did you mean "clip"'):
        check_command(["clipp"], console)


def test_list_names_every_preset():
    out = io.StringIO()
    assert list_command(Console(file=out, width=120)) == 0
    for name in presets():
        assert name in out.getvalue()
    assert resolve_expert("eva02").card.licence in out.getvalue()
