"""Muon beside AdamW: each group is stepped by its own rule, and the pair resumes exactly."""

import copy

import pytest
import torch
from torch import nn

from train.muon import MATRIX, MuonWithAdamW, is_matrix, orthogonalise


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3))


def _groups(model: nn.Module) -> list[dict]:
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if is_matrix(n, p)], MATRIX: True},
        {"params": [p for n, p in named if not is_matrix(n, p)]},
    ]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_each_group_is_stepped_as_by_its_own_optimizer() -> None:
    ours, theirs = _model(), _model()
    start = copy.deepcopy(ours.state_dict())
    pair = MuonWithAdamW(_groups(ours), lr=0.01)
    matrices, rest = (group["params"] for group in _groups(theirs))
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=0.01, weight_decay=0, betas=(0.9, 0.95))
    for seed in range(4):
        _step(ours, pair, seed)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        theirs(x).square().mean().backward()
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
    for name, value in ours.named_parameters():
        other = theirs.get_parameter(name)
        if is_matrix(name, value):  # torch's Muon rounds to bfloat16
            moved = (value - start[name]).norm()
            assert (value - other).norm() < 0.05 * moved
            assert moved > 0
        else:
            assert torch.equal(value, other) or (value - other).norm() < 0.05 * other.norm()


def test_orthogonalise() -> None:
    matrix = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert 0.6 < values.min() < values.max() < 1.3
    assert torch.allclose(orthogonalise(matrix.T), orthogonalise(matrix).T, atol=1e-5)
    assert torch.isfinite(orthogonalise(torch.zeros(3, 4))).all()


def test_a_schedule_reaches_both() -> None:
    model = _model()
    optimizer = MuonWithAdamW(_groups(model), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())
    _step(model, optimizer, 0)
    schedule.step()
    _step(model, optimizer, 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_resumes_exactly() -> None:
    straight, resumed = _model(), _model()
    one = MuonWithAdamW(_groups(straight), lr=0.01)
    for seed in range(6):
        _step(straight, one, seed)
    first = MuonWithAdamW(_groups(resumed), lr=0.01)
    for seed in range(3):
        _step(resumed, first, seed)
    second = MuonWithAdamW(_groups(resumed), lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(3, 6):
        _step(resumed, second, seed)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", (4, 4), True),
        ("model.multi_modal_projector.layers.0.weight", (4, 4), True),
        ("model.language_model.embed_tokens.weight", (4, 4), False),
        ("lm_head.weight", (4, 4), False),
        ("model.vision_tower.towers.clip.patch_embedding.weight", (4, 3, 2, 2), False),
        ("model.language_model.norm.weight", (4,), False),
        ("model.vision_tower.towers.sam.layers.0.attn.rel_pos_h", (4, 4), False),
    ],
)
def test_what_is_a_matrix(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_matrix(name, torch.zeros(shape)) is expected
