"""What docs/use.md says of faster decoding, device maps and plain PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CompileConfig,
    Trainer,
    TrainingArguments,
)

from tests.model_inputs import canvases, prompt

INPUTS = {"input_ids": prompt(1, "image", 9, 10, 9, 10, "image", 8), "pixel_values": canvases(2)}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@torch.no_grad()
def test_drafts_from_the_prompt_write_the_same_tokens(tiny_model):
    expected = tiny_model.generate(**INPUTS, **GREEDY)
    drafted = tiny_model.generate(**INPUTS, **GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted, expected)


@torch.no_grad()
def test_drafts_of_a_language_model_write_the_same_tokens(tiny_model):
    """It sees no images, only their placeholders; one with other weights is wrong all the time."""
    expected = tiny_model.generate(**INPUTS, **GREEDY)
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(tiny_model.config.text_config).eval()
    same = copy.deepcopy(other)
    same.model.load_state_dict(tiny_model.model.language_model.state_dict())
    same.lm_head.load_state_dict(tiny_model.lm_head.state_dict())
    for assistant in (same, other):
        assisted = tiny_model.generate(**INPUTS, **GREEDY, assistant_model=assistant)
        assert torch.equal(assisted, expected)


@torch.no_grad()
def test_compiled_decoding_writes_the_same_tokens(tiny_model):
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    expected = tiny_model.generate(**INPUTS, **GREEDY)
    model = copy.deepcopy(tiny_model)
    options = {"cache_implementation": "static", "compile_config": config}
    assert torch.equal(model.generate(**INPUTS, **GREEDY, **options), expected)
    assert hasattr(model, "_compiled_call")  # or nothing was compiled at all


@torch.no_grad()
@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {
            "model.vision_tower": "cpu",
            "model.multi_modal_projector": "cpu",
            "model.language_model": "cpu",
            "lm_head": "cpu",
        },
    ],
    ids=["auto", "by part"],
)
def test_a_device_map_changes_nothing(tiny_folder, tiny_model, device_map):
    pytest.importorskip("accelerate")
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder, device_map=device_map)
    assert torch.equal(model(**INPUTS).logits.cpu(), tiny_model(**INPUTS).logits)


@pytest.fixture
def tuned(tiny_folder, tmp_path) -> tuple[Any, Path]:
    """Two steps of the plain Trainer on adapters of the language model and on the connector."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q|k|v|o)_proj",
        modules_to_save=["multi_modal_projector"],
    )
    base = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    model = peft.get_peft_model(base, config)
    labels = INPUTS["input_ids"].masked_fill(INPUTS["input_ids"] == 3, -100)

    def collate(_: list[Any]) -> dict[str, Tensor]:
        return {**INPUTS, "labels": labels}

    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        remove_unused_columns=False,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, settings, train_dataset=[0, 1], data_collator=collate).train()  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "adapter")
    return model.eval(), tmp_path / "adapter"


@torch.no_grad()
def test_adapters_of_plain_peft_train_and_come_back(tuned, tiny_folder, tiny_model):
    from peft import PeftModel

    model, folder = tuned
    trained = model(**INPUTS).logits
    assert not torch.allclose(trained, tiny_model(**INPUTS).logits, atol=1e-3)
    adapted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted
    assert all("language_model" in name for name in adapted)
    before = dict(tiny_model.model.vision_tower.named_parameters())
    for name, value in model.base_model.model.model.vision_tower.named_parameters():
        assert torch.equal(value, before[name])
    base = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    again = PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(again(**INPUTS).logits, trained)
    merged = again.merge_and_unload()
    assert torch.allclose(merged(**INPUTS).logits, trained, atol=1e-4)
