"""Gradients: where they reach, recomputed, and through adapters."""

from __future__ import annotations

import pytest
import torch

from eagle_moe.model import EagleMixForConditionalGeneration
from tests.conftest import make_config, make_model
from tests.model_inputs import TINY, canvases, prompt


def test_gradients_reach_every_parameter():
    model = make_model(make_config(TINY))
    ids = prompt(1, "image", 50, 60)
    loss = model(
        input_ids=ids, pixel_values=canvases(1), labels=ids.masked_fill(ids == 3, -100)
    ).loss
    loss.backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    # Softmax does not see what is added to all keys of a query, and the tables' unused rows
    # (position 0 of Pix2Struct) are rows, not parameters.
    assert [name for name in without if not name.endswith("k_proj.bias")] == []


def test_checkpointing_recomputes_and_gives_the_same_gradients():
    model = make_model(make_config(TINY)).train()
    ids, pixels = prompt(1, "image", 50, 60), canvases(1)
    calls: list[str] = []
    parts = {name: expert.blocks for name, expert in model.model.vision_tower.towers.items()}
    for name, blocks in {**parts, "llm": model.model.language_model.layers}.items():
        for block in blocks:  # a layer inside runs again; hooks of the block itself need not
            inside = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
            inside.register_forward_pre_hook(lambda *_, name=name: calls.append(name))

    def gradients() -> list[torch.Tensor]:
        calls.clear()
        model.zero_grad()
        model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def switch(how: str) -> None:  # called `gradient_...` before transformers 5.20
        known = [f"{word}_checkpointing_{how}" for word in ("activation", "gradient")]
        next(getattr(model, name) for name in known if hasattr(model, name))()

    expected, once = gradients(), sorted(calls)
    switch("enable")
    actual = gradients()
    assert sorted(calls) == sorted(2 * once)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    switch("disable")
    gradients()
    assert sorted(calls) == once


@torch.no_grad()
def test_lora_trains_the_llm_only_and_survives_saving(tiny_folder, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector"],
    )
    base = EagleMixForConditionalGeneration.from_pretrained(tiny_folder)
    model = peft.get_peft_model(base, lora)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all("language_model" in n or "multi_modal_projector" in n for n in learning)
    for name, parameter in model.named_parameters():
        if name in learning:
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    again = EagleMixForConditionalGeneration.from_pretrained(tiny_folder)
    again = peft.PeftModel.from_pretrained(again, tmp_path).eval()
    inputs = {"input_ids": prompt(1, "image", 9), "pixel_values": canvases(1)}
    expected = model.eval()(**inputs).logits
    torch.testing.assert_close(again(**inputs).logits, expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
