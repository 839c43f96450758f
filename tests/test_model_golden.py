"""The whole model against the official Eagle release: splice, logits, loss, gradients, decoding,
and the prompts and supervised tokens of the chat templates.

The numbers are the official code's own, on random weights; see `eagle_release`.
"""

from __future__ import annotations

import json

import pytest
import torch
from eagle_release import (
    GOLDENS,
    build,
    clip_arch,
    config,
    eva_arch,
    load,
    needs_goldens,
    pix_arch,
    read,
    sam_arch,
)
from transformers import PreTrainedTokenizerFast

from eagle_moe.config import EagleMixConfig
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.processor import read_template

pytestmark = needs_goldens
IMAGE = 63  # a token that occurs in none of the golden texts or answers
TOKENS = 1024
LIMIT = 1044  # the official tokenizer_model_max_length of this golden


def golden_model(tensors: dict, swap: bool = False) -> EagleMixForConditionalGeneration:
    """The release's X5 mixture in small; `swap` puts two experts in the wrong order."""
    vision, llm = config("e2e", "vision"), config("e2e", "llm")
    size = vision["input"]
    convnext = {key: vision["convnext"][key] for key in ("depths", "dims")}
    parts = [
        build("clip", vision["clip_input"], clip_arch(vision["clip"])),
        build("convnext", size, convnext),
        build("sam", size, sam_arch(vision["sam"])),
        build("eva02", size, eva_arch(vision["eva"], [2])),
        build("pix2struct", 720, pix_arch(vision["pix"])),
    ]
    order = [0, 1, 2, 4, 3] if swap else range(5)
    model = EagleMixForConditionalGeneration(
        EagleMixConfig(
            vision_config={
                "canvas_size": size,
                "experts": [parts[i].spec.dump() for i in order],
                "fusion": {"kind": "channel_concat", "grid": 32},
            },
            text_config={"model_type": "llama", "max_position_embeddings": 4096, **llm},
            connector={"kind": "mlp", "depth": 2},
            image_token_id=IMAGE,
        )
    ).eval()
    towers = model.model.vision_tower.towers
    for i, part in enumerate(parts):
        prefix = f"weight.model.vision_tower.vision_towers.{i}.vision_tower."
        load(towers[part.spec.name], tensors, prefix)

    def below(prefix: str) -> dict:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.model.multi_modal_projector.layers.load_state_dict(below("weight.model.mm_projector."))
    model.lm_head.load_state_dict(below("weight.lm_head."))
    llama = {k: v for k, v in below("weight.model.").items() if k[:3] in ("emb", "lay", "nor")}
    model.model.language_model.load_state_dict(llama)
    return model


def expand(ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> dict:
    """Official sentinels (-200) -> our placeholders, cut and padded as the release does."""
    rows = []
    for row, row_labels, kept in zip(ids, labels, mask.bool(), strict=True):
        tokens, targets = [], []
        for token, target in zip(row[kept].tolist(), row_labels[kept].tolist(), strict=True):
            image = token == -200
            tokens += [IMAGE] * TOKENS if image else [token]
            targets += [-100] * TOKENS if image else [target]
        rows.append((tokens[:LIMIT], targets[:LIMIT]))
    width = max(len(tokens) for tokens, _ in rows)
    return {
        "input_ids": torch.tensor([t + [0] * (width - len(t)) for t, _ in rows]),
        "labels": torch.tensor([y + [-100] * (width - len(y)) for _, y in rows]),
        "attention_mask": torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t, _ in rows]),
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return read("e2e")


@pytest.fixture(scope="module")
def model(golden) -> EagleMixForConditionalGeneration:
    return golden_model(golden)


def test_batch_with_an_image_each_and_one_without(model, golden):
    batch = expand(golden["input_ids"], golden["labels"], golden["attention_mask"])
    mask = batch["attention_mask"]
    assert torch.equal(mask, golden["prepared.attention_mask"].long())
    assert torch.equal(batch["labels"], golden["prepared.labels"].long())
    model.zero_grad()
    output = model(**batch, pixel_values=golden["images_u8"])
    projected = golden["projected_image_features_sample0"]
    torch.testing.assert_close(output.image_hidden_states[:TOKENS], projected, atol=2e-4, rtol=1e-4)
    kept = mask.bool()
    torch.testing.assert_close(output.logits[kept], golden["logits"][kept], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(output.loss, golden["loss"][0], rtol=1e-5, atol=0)

    output.loss.backward()
    projector, llm = model.model.multi_modal_projector.layers, model.model.language_model
    for name, parameter in {
        "lm_head.weight": model.lm_head.weight,
        "model.embed_tokens.weight": llm.embed_tokens.weight,
        "model.layers.0.self_attn.q_proj.weight": llm.layers[0].self_attn.q_proj.weight,
        "model.mm_projector.0.weight": projector[0].weight,
        "model.mm_projector.2.bias": projector[2].bias,
    }.items():
        expected = golden[f"grad.{name}"]
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm(), name


@torch.no_grad()
def test_two_images_in_one_prompt(model, golden):
    ids = golden["two_images.input_ids"]
    tokens, labels = [], []
    for token, label in zip(ids[0].tolist(), golden["two_images.labels"][0].tolist(), strict=True):
        tokens += [IMAGE] * TOKENS if token == -200 else [token]
        labels += [-100] * TOKENS if token == -200 else [label]
    output = model(
        input_ids=torch.tensor([tokens]),
        labels=torch.tensor([labels]),
        pixel_values=golden["images_u8"],
    )
    expected = golden["two_images.logits_last16"]
    torch.testing.assert_close(output.logits[:, -16:], expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(output.loss, golden["two_images.loss"][0], rtol=1e-5, atol=0)


@torch.no_grad()
def test_text_only(model, golden):
    ids = golden["input_ids"][2:3, :12].long()
    output = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(output.logits, golden["text_only.logits"], atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_greedy_decoding(model, golden):
    prompt = golden["generate.prompt_ids"][0].tolist()
    tokens = [t for token in prompt for t in ([IMAGE] * TOKENS if token == -200 else [token])]
    output = model.generate(
        input_ids=torch.tensor([tokens]),
        pixel_values=golden["images_u8"][:1],
        max_new_tokens=10,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[:, len(tokens) :].tolist() == golden["generate.greedy_ids"].tolist()
    steps = torch.cat(output.logits)
    torch.testing.assert_close(steps, golden["generate.step_logits"], atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_two_experts_in_the_wrong_order_are_seen(golden):
    """Both have 16 channels, so nothing but the numbers tells."""
    wrong = golden_model(golden, swap=True)
    tokens = wrong.get_image_features(golden["images_u8"][:1]).pooler_output[0]
    expected = golden["projected_image_features_sample0"]
    assert (tokens - expected).norm() > 0.05 * expected.norm()


BOS = "<|begin_of_text|>"
TEMPLATES = {"v1": "vicuna", "llama3": "llama3"}


def conversations(template: str) -> list[tuple[dict, list[dict]]]:
    """Golden entries of an official template, each with its turns as we write them."""
    entries = json.loads((GOLDENS / "text.json").read_text())["templates"]
    roles = {"human": "user", "gpt": "assistant"}
    return [
        (entry, [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns])
        for entry in entries
        if entry["template"] == template
        for turns in [entry["conversation_after_image_rule"]]
    ]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDENS / "tiny_llama3_tokenizer.json"),
        bos_token=BOS,
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts(tokenizer, template):
    text = read_template(TEMPLATES[template])
    cases = conversations(template)
    assert cases
    for entry, turns in cases:
        written = tokenizer.apply_chat_template(turns, chat_template=text, tokenize=False)
        assert written == entry["prompt"].removeprefix(BOS)
        asked = tokenizer.apply_chat_template(
            turns[:1], chat_template=text, tokenize=False, add_generation_prompt=True
        )
        assert asked == entry["inference_prompt_first_turn"].removeprefix(BOS)


@pytest.mark.parametrize("template", ["plain", "llama3"])
def test_supervised_tokens(tokenizer, template):
    """Token for token, but for the release's second BOS."""
    text = read_template(TEMPLATES.get(template, template))
    image = tokenizer.convert_tokens_to_ids("<image>")
    for entry, turns in conversations(template):
        if entry["tokenizer"] != "tiny_llama3":
            continue
        output = tokenizer.apply_chat_template(
            turns, chat_template=text, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = [-200 if token == image else token for token in output["input_ids"]]
        ours = [t if k else -100 for t, k in zip(ids, output["assistant_masks"], strict=True)]
        bos = entry["input_ids"].count(tokenizer.bos_token_id)
        assert ids == entry["input_ids"][bos:]
        assert ours == entry["labels"][bos:]
