from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_model
from peft import PeftModel

from eagle_moe.model import EagleMixForConditionalGeneration
from train.learning import learning_names, learning_parts
from train.lora import add_lora, merge_lora
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


def disturb(model: torch.nn.Module) -> None:
    """As if trained: adapters start as zero, and so would hide every mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)


def test_only_adapters_of_the_part_learn(model: EagleMixForConditionalGeneration) -> None:
    add_lora(model, {"language_model": Lora(r=2)})
    assert learning_parts(model) == {"language_model"}
    assert all(".lora_" in name for name in learning_names(model))
    assert add_lora(model, {}) is None


def test_target_modules_are_chosen_by_last_name(model: EagleMixForConditionalGeneration) -> None:
    add_lora(model, {"language_model": Lora(target_modules=["q_proj", "v_proj"])})
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in learning_names(model)}
    assert adapted == {"q_proj", "v_proj"}


def test_an_unknown_layer_names_the_nearest(model: EagleMixForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match=r'lora.language_model.*Did you mean "q_proj"'):
        add_lora(model, {"language_model": Lora(target_modules=["q_prj"])})


def test_a_new_adapter_changes_nothing(model: EagleMixForConditionalGeneration) -> None:
    before = logits(model)
    add_lora(model, {"language_model": Lora(), "experts.clip": Lora()})
    assert torch.equal(logits(model), before)


def test_merged_weights_and_kept_adapters_are_the_trained_model(
    model: EagleMixForConditionalGeneration, tmp_path: Path
) -> None:
    adapters = {"language_model": Lora(r=2), "experts.clip": Lora(r=4, alpha=8)}
    names = set(model.state_dict())
    untouched = logits(model)
    wrapper = add_lora(model, adapters)
    assert wrapper is not None
    disturb(model)
    trained = logits(model)
    assert (trained - untouched).abs().max() > 0.1
    merge_lora(wrapper, tmp_path)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(logits(model), trained, atol=1e-3, rtol=1e-3)

    fresh = make_model(make_config())
    again = PeftModel.from_pretrained(
        fresh, str(tmp_path / "language_model"), adapter_name="language_model"
    )
    again.load_adapter(str(tmp_path / "experts_clip"), adapter_name="experts_clip")
    again.base_model.set_adapter(["language_model", "experts_clip"])
    torch.testing.assert_close(logits(again.eval()), trained, atol=1e-6, rtol=1e-6)
