from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

from eagle_moe.build import load_model
from eagle_moe.model import EagleMixForConditionalGeneration
from tests.test_lora import distance, disturb, logits
from tests.tiny_run import make_world
from train.lora import add_lora, merge_lora
from train.quantize import dequantize_linears, linears, quantize_linears
from train.recipe import Lora, parse_recipe
from train.run import run_recipe

QLORA = {"language_model": Lora(r=2, quantize="nf4")}


@pytest.fixture
def model(tiny_model: EagleMixForConditionalGeneration) -> EagleMixForConditionalGeneration:
    return copy.deepcopy(tiny_model).requires_grad_(False)


@pytest.fixture
def with_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


def test_without_bitsandbytes_one_line_names_the_extra(
    model: EagleMixForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"^[^\n]*eagle-moe\[quant\][^\n]*$"):
        add_lora(model, QLORA)


def test_only_the_language_model_is_kept_in_four_bits(tmp_path: Path) -> None:
    recipe = make_world(tmp_path)
    recipe["stages"]["sft"] |= {
        "trainable": ["connector"],
        "lr": {},
        "lora": {"experts.clip": {"quantize": "nf4"}},
    }
    with pytest.raises(ValueError, match=r"lora.experts.clip: quantize is for `language_model`"):
        parse_recipe(recipe, "recipe")


@pytest.mark.usefixtures("with_bitsandbytes")
def test_every_linear_layer_of_the_part_is_rounded_and_no_other(
    model: EagleMixForConditionalGeneration,
) -> None:
    before = logits(model)
    others = {n: v.clone() for n, v in model.state_dict().items() if "language_model" not in n}
    quantize_linears(model, "language_model", torch.float32)
    layers = dict(linears(model, "language_model"))
    assert len(layers) == 14  # 7 in each of 2 layers
    assert {layer.weight.dtype for layer in layers.values()} == {torch.uint8}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in others.items())
    assert 0.01 < distance(logits(model), before) < 1  # widths of 32 round badly


@pytest.mark.usefixtures("with_bitsandbytes")
def test_plain_again_it_computes_what_the_rounded_one_did(
    model: EagleMixForConditionalGeneration,
) -> None:
    names = list(model.state_dict())
    quantize_linears(model, "language_model", torch.float32)
    rounded = logits(model)
    dequantize_linears(model)
    assert distance(logits(model), rounded) < 1e-6
    assert list(model.state_dict()) == names


@pytest.mark.usefixtures("with_bitsandbytes")
@pytest.mark.parametrize("dora", [False, True])
def test_the_merged_model_computes_what_the_trained_one_did(
    model: EagleMixForConditionalGeneration, tmp_path: Path, dora: bool
) -> None:
    names = set(model.state_dict())
    adapters = {
        "language_model": Lora(r=2, quantize="nf4", use_dora=dora),
        "experts.clip": Lora(r=2),
    }
    wrapper = add_lora(model, adapters)
    assert wrapper is not None
    disturb(model)
    trained = logits(model)
    merge_lora(wrapper, tmp_path)
    assert set(model.state_dict()) == names
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert distance(logits(model), trained) < 1e-5


@pytest.mark.usefixtures("with_bitsandbytes")
def test_adapters_on_rounded_weights_merged_into_full_ones_are_another_model(
    model: EagleMixForConditionalGeneration, tmp_path: Path
) -> None:
    """The mistake that merging into the original weights would be."""
    untouched = copy.deepcopy(model)
    wrapper = add_lora(model, QLORA)
    assert wrapper is not None
    disturb(model)
    trained = logits(model)
    full = add_lora(untouched, {"language_model": Lora(r=2)})
    assert full is not None
    disturb(untouched)
    merge_lora(full, tmp_path)
    assert distance(logits(untouched), trained) > 1e-3


@pytest.mark.usefixtures("with_bitsandbytes")
def test_a_stage_trains_adapters_on_rounded_weights_and_ends_in_a_plain_model(
    tmp_path: Path,
) -> None:
    recipe = make_world(tmp_path)
    recipe["stages"] = {"sft": recipe["stages"]["sft"]}
    recipe["stages"]["sft"] |= {
        "init_from": [],
        "trainable": ["connector"],
        "lr": {},
        "lora": {"language_model": {"r": 2, "quantize": "nf4"}},
        "eval": None,  # without gradients, bitsandbytes on a CPU takes multiples of 32 alone
    }
    model = load_model(run_recipe(recipe))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert (tmp_path / "run/sft/adapters/language_model/adapter_model.safetensors").is_file()
