from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import part_blocks, part_modules
from tests.conftest import make_config, make_model
from train.learning import open_parts
from train.recompute import recompute_blocks


@pytest.fixture
def model() -> EagleMixForConditionalGeneration:
    return make_model(make_config(("clip-tiny", "convnext-tiny"), grid=2)).train()


def step(model: nn.Module) -> tuple[list[torch.Tensor], int]:
    """Gradients of one step, and the bytes that were kept for its backward pass."""
    ids = torch.tensor([[3] * 4 + [40, 50, 60]])
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=generator)
    model.zero_grad()
    torch.manual_seed(1)  # of dropout
    kept = 0

    def pack(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(input_ids=ids, pixel_values=canvas, labels=ids, use_cache=False).loss
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], kept


def count_calls(model: nn.Module, part: str) -> list[int]:
    """How often a linear layer inside the part's first block runs."""
    calls = [0]
    inside = next(m for m in part_blocks(model, part)[0].modules() if isinstance(m, nn.Linear))

    def count(*_: Any) -> None:
        calls[0] += 1

    inside.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("parts", [("experts.clip",), ("experts.convnext", "language_model")])
def test_recomputed_parts_keep_less_and_give_the_same_gradients(
    model: EagleMixForConditionalGeneration, parts: tuple[str, ...]
) -> None:
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.3
    plain, kept = step(model)
    names = list(model.state_dict())
    recompute_blocks(model, parts)
    calls = {part: count_calls(model, part) for part in ("experts.clip", *parts)}
    again, kept_now = step(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert kept_now < 0.9 * kept
    assert {part: n[0] for part, n in calls.items()} == {
        part: 2 if part in parts else 1 for part in ("experts.clip", *parts)
    }
    assert list(model.state_dict()) == names


def test_a_frozen_language_model_in_evaluation_mode_is_recomputed_too(
    model: EagleMixForConditionalGeneration,
) -> None:
    """transformers' switch would do nothing there: it goes by training mode."""
    model.requires_grad_(False)
    open_parts(model, ["connector"])
    for part in ("experts.clip", "experts.convnext", "language_model"):
        for module in part_modules(model, part):
            module.eval()
    plain, kept = step(model)
    model.activation_checkpointing_enable()
    _, with_switch = step(model)
    assert with_switch == kept
    model.activation_checkpointing_disable()
    recompute_blocks(model, ["language_model"])
    again, kept_now = step(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert kept_now < 0.6 * kept


def test_frozen_experts_would_keep_more_not_less(
    model: EagleMixForConditionalGeneration,
) -> None:
    """Why a stage leaves out the checkpointing of frozen experts: their inputs would be kept."""
    model.requires_grad_(False)
    open_parts(model, ["connector"])
    _, kept = step(model)
    recompute_blocks(model, ["experts.clip", "experts.convnext"])
    assert step(model)[1] > kept


def test_without_gradients_blocks_run_once(model: EagleMixForConditionalGeneration) -> None:
    recompute_blocks(model, ["language_model"])
    calls = count_calls(model, "language_model")
    with torch.no_grad():
        model(input_ids=torch.tensor([[40, 50]]))
    assert calls == [1]


def test_a_connector_has_no_blocks(model: EagleMixForConditionalGeneration) -> None:
    assert part_blocks(model, "connector") == []
    assert len(part_blocks(model, "language_model")) == 2
