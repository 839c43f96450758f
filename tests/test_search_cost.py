"""train/search/cost.py: what is counted is what the model has and does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eagle_moe.build import build_config
from eagle_moe.parts import LANGUAGE_MODEL, part_of
from eval.speed.seconds import median_seconds
from tests.conftest import make_config, make_model
from train.flops import Flops
from train.recipe import load_recipe
from train.search.cost import mixture_cost

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
CPU = torch.device("cpu")


@pytest.mark.parametrize("experts", [("clip-tiny",), ("sam-tiny", "convnext-tiny")])
def test_parameters_and_flops_are_those_of_the_model(experts: tuple[str, ...]) -> None:
    config = make_config(experts)
    cost = mixture_cost(config)
    model = make_model(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    vision = sum(size for name, size in sizes.items() if part_of(name) != LANGUAGE_MODEL)
    assert cost.parameters == vision
    assert cost.parameters < sum(sizes.values())
    canvas = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_image_features(canvas)
    # on a CPU, torch counts attention that it fuses as nothing
    assert 0.5 * (cost.flops or 0) < counter.get_total_flops() <= (cost.flops or 0)
    assert cost.images_per_second is None


def test_more_experts_cost_more() -> None:
    one, two = (
        mixture_cost(make_config(names)) for names in (("clip-tiny",), ("clip-tiny", "sam-tiny"))
    )
    assert (one.parameters or 0) < (two.parameters or 0)
    assert (one.flops or 0) < (two.flops or 0)


def test_full_size_parameters_agree_with_what_was_counted_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five experts and the connector of Vicuna-7B: 2270.8 M + 48.2 M. Their FLOPs take many
    seconds to count; tests/test_flops.py does."""
    monkeypatch.setattr("train.search.cost.model_flops", lambda _: Flops({"connector": 7}, 0, 0, 0))
    spec = load_recipe(RECIPES / "eagle-x5-vicuna-7b.yaml").model
    cost = mixture_cost(build_config(spec, 32000))
    assert cost.parameters == pytest.approx(2319.0e6, rel=1e-4)
    assert cost.flops == 7


def test_speed_is_measured_and_leaves_random_numbers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []

    def slow(work, device):
        taken.append(work().shape)
        return 0.25

    monkeypatch.setattr("train.search.cost.median_seconds", slow)
    state = torch.get_rng_state()
    cost = mixture_cost(make_config(("clip-tiny",), grid=2), "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert taken == [(8, 4, 32)]  # eight images, four tokens each, of the language model's width
    assert cost.images_per_second == 8 / 0.25


def test_seconds_are_the_median_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    durations = iter([100.0, 1.0, 9.0, 2.0, 100.0])  # the first is the warm-up

    def work() -> None:
        nonlocal now
        now += next(durations)

    monkeypatch.setattr("eval.speed.seconds.time.perf_counter", lambda: now)
    assert median_seconds(work, CPU, budget=11.0) == 2.0
    assert list(durations) == [100.0]  # that many were not asked for
