from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eagle_moe.build import build_config
from eagle_moe.loss import label_loss
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import LANGUAGE_MODEL
from tests.conftest import make_config, make_model
from train.flops import Flops, model_flops, training_factors
from train.learning import open_parts
from train.recipe import load_recipe

LENGTH, LABELS = 12, 5
RECIPES = Path(__file__).parents[1] / "configs" / "recipes"


@pytest.fixture(scope="module")
def model() -> EagleMixForConditionalGeneration:
    model = make_model(make_config(grid=2)).train()
    model.set_attn_implementation("eager")  # so that every product is one that torch counts
    return model


@pytest.fixture(scope="module")
def flops(model: EagleMixForConditionalGeneration) -> Flops:
    return model_flops(model.config)


def text_step(model: EagleMixForConditionalGeneration, backward: bool) -> int:
    """What torch counts in the language model and its loss, for one row of tokens."""
    torch.manual_seed(0)
    embeddings = torch.randn(1, LENGTH, model.config.text_config.hidden_size).requires_grad_(
        backward
    )
    labels = torch.full((1, LENGTH), -100)
    labels[0, -LABELS:] = 20
    with FlopCounterMode(display=False) as counter:
        hidden = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
        loss = label_loss(model.lm_head, hidden, labels)
        if backward:
            loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def text_formula(flops: Flops, factor: float, positions: float) -> float:
    factors = {**dict.fromkeys(flops.image, 1.0), LANGUAGE_MODEL: factor}
    return flops.of_batch(factors, 0, LENGTH, positions, LABELS)


def test_the_language_model_is_counted_as_torch_counts_it(
    model: EagleMixForConditionalGeneration, flops: Flops
) -> None:
    with torch.no_grad():
        counted = text_step(model, backward=False)
    # torch computes all positions for each token, also those that are masked
    assert counted == text_formula(flops, 1, LENGTH * LENGTH)
    assert counted > text_formula(flops, 1, LENGTH * (LENGTH + 1) / 2)


@pytest.mark.parametrize(("learns", "factor"), [(True, 3), (False, 2)])
def test_so_is_its_backward_pass(
    model: EagleMixForConditionalGeneration, flops: Flops, learns: bool, factor: int
) -> None:
    model = copy.deepcopy(model).requires_grad_(learns)
    assert text_step(model, backward=True) == text_formula(flops, factor, LENGTH * LENGTH)
    wrong = 5 - factor
    assert text_step(model, backward=True) != text_formula(flops, wrong, LENGTH * LENGTH)


def test_images_are_counted_by_expert(
    model: EagleMixForConditionalGeneration, flops: Flops
) -> None:
    canvas = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_image_features(canvas)
    assert counter.get_total_flops() == 3 * sum(flops.image.values())
    assert set(flops.image) == {"experts.clip", "experts.convnext", "connector"}
    ones = dict.fromkeys((*flops.image, LANGUAGE_MODEL), 1.0)
    assert flops.of_batch(ones, 3, 0, 0, 0) == counter.get_total_flops()
    assert flops.of_batch(ones, 3, 0, 0, 0, cached=3) == 3 * flops.image["connector"]


def test_a_trained_expert_takes_three_times_its_forward_pass(
    model: EagleMixForConditionalGeneration, flops: Flops
) -> None:
    expert = copy.deepcopy(model.model.vision_tower.towers["clip"]).requires_grad_(True)
    view = expert.view(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with FlopCounterMode(display=False) as counter:
        expert(view).sum().backward()
    # no gradient for the picture; but torch's attention computes its scores a second time
    assert 2.8 < counter.get_total_flops() / flops.image["experts.clip"] < 3.1


@pytest.mark.parametrize(
    ("parts", "factors"),
    [
        (("connector",), (1, 1, 3, 2)),
        (("experts.clip",), (3, 1, 2, 2)),
        (("language_model",), (1, 1, 1, 3)),
        (("experts", "connector", "language_model"), (3, 3, 3, 3)),
    ],
)
def test_factors_follow_what_learns(
    model: EagleMixForConditionalGeneration, parts: tuple[str, ...], factors: tuple[int, ...]
) -> None:
    model = copy.deepcopy(model).requires_grad_(False)
    every = ("experts.clip", "experts.convnext", "connector", LANGUAGE_MODEL)
    open_parts(model, every if "experts" in parts else parts)
    assert training_factors(model) == dict(zip(every, factors, strict=True))


def test_counting_leaves_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    model_flops(make_config(("clip-tiny",), grid=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_full_size_agrees_with_numbers_from_elsewhere() -> None:
    """Published parameter counts and shapes, put together by hand: X5 with Vicuna-7B."""
    spec = load_recipe(RECIPES / "eagle-x5-vicuna-7b.yaml").model
    flops = model_flops(build_config(spec, 32000))
    tera = {name.removeprefix("experts."): value / 1e12 for name, value in flops.image.items()}
    assert tera["clip"] == pytest.approx(2 * 24 * (12 * 1024**2 * 577) / 1e12, rel=0.12)
    assert flops.token == 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert flops.position == 32 * 4 * 4096
    assert sum(tera.values()) == pytest.approx(15.37, abs=0.01)
    tokens = 1024 + 128
    seen = tokens * (tokens + 1) / 2
    trained = dict.fromkeys((*flops.image, LANGUAGE_MODEL), 3.0)
    sample = flops.of_batch(trained, 1, tokens, seen, 64) / 1e12
    assert sample == pytest.approx(92.0, abs=0.1)


def test_what_is_counted_is_a_number_per_image_not_per_batch(flops: Flops) -> None:
    ones = dict.fromkeys((*flops.image, LANGUAGE_MODEL), 1.0)
    one = flops.of_batch(ones, 1, 100, 5050, 10)
    two = flops.of_batch(ones, 2, 100, 5050, 10)
    assert two - one == sum(flops.image.values())
