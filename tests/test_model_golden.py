"""The prompts and supervised tokens of the chat templates against the official Eagle release."""

from __future__ import annotations

import json

import pytest
from eagle_release import GOLDENS, needs_goldens
from transformers import PreTrainedTokenizerFast

from eagle_moe.processor import read_template

pytestmark = needs_goldens
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
