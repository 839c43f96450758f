from __future__ import annotations

import copy

import pytest
import torch

from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import (
    all_parts,
    by_part,
    model_tensors,
    part_hashes,
    part_modules,
    part_of,
    resolve_parts,
    tensor_hash,
    tensor_hashes,
)
from tests.conftest import make_config, make_model

EXPERTS = ("clip", "convnext")


@pytest.fixture
def model(tiny_model: EagleMixForConditionalGeneration) -> EagleMixForConditionalGeneration:
    return copy.deepcopy(tiny_model).requires_grad_(False)


def test_every_tensor_belongs_to_exactly_one_part(
    model: EagleMixForConditionalGeneration,
) -> None:
    owned = [
        id(parameter)
        for part in all_parts(EXPERTS)
        for module in part_modules(model, part)
        for parameter in module.parameters()
    ]
    assert sorted(owned) == sorted(id(parameter) for parameter in model.parameters())
    assert {part_of(name) for name in model_tensors(model)} == set(all_parts(EXPERTS))


def test_parts_resolve_in_model_order_and_say_the_nearest_name() -> None:
    names = ["language_model", "experts.convnext"]
    assert resolve_parts(names, EXPERTS, "x") == ("experts.convnext", "language_model")
    assert resolve_parts(["experts"], EXPERTS, "x") == ("experts.clip", "experts.convnext")
    with pytest.raises(ValueError, match='x: no part "experts.clap". Did you mean "experts.clip"'):
        resolve_parts(["experts.clap"], EXPERTS, "x")


def test_the_narrower_part_wins_whatever_the_order() -> None:
    for values in ({"experts.clip": 1, "experts": 2}, {"experts": 2, "experts.clip": 1}):
        assert by_part(values, EXPERTS) == {"experts.clip": 1, "experts.convnext": 2}


def test_tied_weights_are_counted_once() -> None:
    tied = make_model(make_config(tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert "lm_head.weight" not in model_tensors(tied)
    assert "model.language_model.embed_tokens.weight" in model_tensors(tied)


def test_hashes_see_one_bit_the_shape_and_the_dtype() -> None:
    value = torch.arange(6.0)
    other = value.clone()
    other[3] = torch.nextafter(other[3], torch.tensor(9.0))
    variants = [value, other, value.reshape(2, 3), value.view(torch.int32), value[:0]]
    assert len({tensor_hash(variant) for variant in variants}) == len(variants)
    assert tensor_hash(value.reshape(2, 3).T) == tensor_hash(value.reshape(2, 3).T.contiguous())
    assert tensor_hash(torch.tensor(1.0).to(torch.bfloat16))


def test_a_part_hash_depends_on_its_own_part_alone(
    model: EagleMixForConditionalGeneration,
) -> None:
    before = part_hashes(tensor_hashes(model_tensors(model)))
    with torch.no_grad():
        next(part_modules(model, "experts.clip")[0].parameters()).flatten()[0].add_(1)
    after = part_hashes(tensor_hashes(model_tensors(model)))
    assert {part for part in before if before[part] != after[part]} == {"experts.clip"}
