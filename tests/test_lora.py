from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import part_blocks, part_of
from tests.conftest import make_config, make_model
from train.learning import learning_names, learning_parts
from train.lora import add_lora, merge_lora
from train.quantize import linears
from train.recipe import Lora


@pytest.fixture
def model(tiny_model: EagleMixForConditionalGeneration) -> EagleMixForConditionalGeneration:
    return copy.deepcopy(tiny_model).requires_grad_(False)


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[3] * 16 + [40, 50, 60]])
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=canvas).logits


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def disturb(model: torch.nn.Module) -> None:
    """As if trained: adapters start as zero, and so would hide every mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05, generator=generator)


def fresh() -> EagleMixForConditionalGeneration:
    return make_model(make_config())


def adapted_layers(model: torch.nn.Module) -> set[str]:
    return {name.partition(".lora_")[0] for name in learning_names(model)}


def test_only_adapters_of_the_part_learn(model: EagleMixForConditionalGeneration) -> None:
    add_lora(model, {"language_model": Lora(r=2)})
    assert learning_parts(model) == {"language_model"}
    assert all(".lora_" in name for name in learning_names(model))
    assert add_lora(model, {}) is None


def test_target_modules_are_chosen_by_last_name(model: EagleMixForConditionalGeneration) -> None:
    add_lora(model, {"language_model": Lora(target_modules=["q_proj", "v_proj"])})
    adapted = {name.rpartition(".")[2] for name in adapted_layers(model)}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize("part", ["language_model", "experts.clip"])
@pytest.mark.parametrize("patterns", [["q_proj"], ["self_attn.*_proj"], ["*"], None])
def test_patterns_reach_no_other_part_with_layers_of_the_same_names(
    model: EagleMixForConditionalGeneration, part: str, patterns: list[str] | None
) -> None:
    """CLIP and Llama both call their projections q_proj, k_proj, v_proj."""
    last = {"q_proj", "k_proj", "v_proj"}
    clip, llama = (
        {name.rpartition(".")[2] for name, _ in linears(model, each)}
        for each in ("experts.clip", "language_model")
    )
    assert last <= clip & llama  # or this test shows nothing
    add_lora(model, {part: Lora(r=2, target_modules=patterns)})
    assert learning_parts(model) == {part}
    layers = adapted_layers(model)
    assert all(part_of(f"{name}.") == part for name in layers)
    count = len(part_blocks(model, part))
    if patterns == ["q_proj"]:
        assert len(layers) == count
    elif patterns == ["self_attn.*_proj"]:
        assert {name.rpartition(".")[2] for name in layers} >= last
        assert all(".self_attn." in name for name in layers)
    else:  # more than 20 names: from there on peft looks for shorter ones that mean the same
        assert len(layers) == len([name for name, _ in linears(fresh(), part)])


def test_names_as_peft_takes_them_would_reach_other_parts(
    model: EagleMixForConditionalGeneration,
) -> None:
    """What a recipe's patterns would do if they were handed on as they are."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert learning_parts(model) == {"language_model", "experts.clip"}


def test_two_parts_with_the_same_pattern_keep_their_own_ranks(
    model: EagleMixForConditionalGeneration,
) -> None:
    chosen = {"target_modules": ["q_proj"]}
    add_lora(model, {"language_model": Lora(r=2, **chosen), "experts.clip": Lora(r=3, **chosen)})
    ranks = {
        (part_of(name), value.shape[0])
        for name, value in model.named_parameters()
        if ".lora_A." in name
    }
    assert ranks == {("language_model", 2), ("experts.clip", 3)}


def test_an_unknown_layer_names_the_nearest(model: EagleMixForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match=r'lora.language_model.*Did you mean "q_proj"'):
        add_lora(model, {"language_model": Lora(target_modules=["q_prj"])})
    with pytest.raises(ValueError, match=r"no linear layer `fc1`.*Valid: .*q_proj"):
        add_lora(model, {"language_model": Lora(target_modules=["q_proj", "fc1"])})
    assert learning_parts(model) == set()  # nothing was added by halves


def test_a_new_adapter_changes_nothing(model: EagleMixForConditionalGeneration) -> None:
    before = logits(model)
    add_lora(model, {"language_model": Lora(), "experts.clip": Lora()})
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_weights_and_kept_adapters_are_the_trained_model(
    model: EagleMixForConditionalGeneration, tmp_path: Path, dora: bool
) -> None:
    adapters = {
        "language_model": Lora(r=2, use_dora=dora),
        "experts.clip": Lora(r=4, alpha=8, use_rslora=not dora),
    }
    names = set(model.state_dict())
    untouched = logits(model)
    wrapper = add_lora(model, adapters)
    assert wrapper is not None
    disturb(model)
    trained = logits(model)
    assert (trained - untouched).abs().max() > 0.1
    merge_lora(wrapper, tmp_path)
    assert set(model.state_dict()) == names
    assert distance(logits(model), trained) < 1e-5

    again = PeftModel.from_pretrained(
        fresh(), str(tmp_path / "language_model"), adapter_name="language_model"
    )
    again.load_adapter(str(tmp_path / "experts_clip"), adapter_name="experts_clip")
    again.base_model.set_adapter(["language_model", "experts_clip"])
    assert distance(logits(again.eval()), trained) < 1e-6
