from __future__ import annotations

import copy

import pytest

from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import (
    part_of,
)
from train.learning import (
    frozen_modules,
    learning_names,
    learning_parts,
    open_parts,
    parameter_groups,
)

EXPERTS = ("clip", "convnext")


@pytest.fixture
def model(tiny_model: EagleMixForConditionalGeneration) -> EagleMixForConditionalGeneration:
    return copy.deepcopy(tiny_model).requires_grad_(False)


def test_opening_parts_opens_these_alone(model: EagleMixForConditionalGeneration) -> None:
    open_parts(model, ["experts.clip", "connector"])
    assert learning_parts(model) == {"experts.clip", "connector"}
    expected = {n for n, _ in model.named_parameters() if part_of(n) in learning_parts(model)}
    assert learning_names(model) == expected


def test_frozen_modules_are_those_in_which_nothing_learns(
    model: EagleMixForConditionalGeneration,
) -> None:
    open_parts(model, ["experts.clip"])
    frozen = {id(parameter) for m in frozen_modules(model) for parameter in m.parameters()}
    assert frozen == {
        id(value) for name, value in model.named_parameters() if part_of(name) != "experts.clip"
    }


def test_groups_hold_each_learning_parameter_once_with_its_rate_and_decay(
    model: EagleMixForConditionalGeneration,
) -> None:
    open_parts(model, ["experts.clip", "language_model"])
    decayed = [name for name, value in model.named_parameters() if value.dim() > 1]
    rates = {"experts.clip": 1e-5, "language_model": 1e-3}
    groups = parameter_groups(model, rates, 0.1, decayed)
    seen = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in seen
            seen[id(parameter)] = (group["part"], group["lr"], group["weight_decay"])
    assert seen == {
        id(value): (part_of(name), rates[part_of(name)], 0.1 if name in decayed else 0.0)
        for name, value in model.named_parameters()
        if value.requires_grad
    }
