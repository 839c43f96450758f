"""The release end to end on a tiny Llama: splice, logits, loss, every gradient, two images, text
alone, greedy decoding.

The release finds its placeholder -200 in the ids and splices 1024 rows in; ours is a token of its
own, written 1024 times. It gives a text-only sample an image of zeros, ours runs no expert for it.
"""

from __future__ import annotations

import json
import math
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from eagle_moe.interop.eagle_release import release_rules
from eagle_moe.interop.keymap import Plan
from eagle_moe.model import (
    EagleMixCausalLMOutput,
    EagleMixForConditionalGeneration,
    EagleMixModel,
)
from tests.eagle_release import (
    GOLDENS,
    LOGIT,
    LOSS,
    assert_same,
    config,
    load,
    official,
    outputs,
    read,
    release_model,
)
from tests.parity import distance, recorded

INPUTS = r"attention_mask|labels|images_u8|(two_images\.)?(input_ids|labels)|generate\.prompt_ids"
NAMES = outputs("e2e", INPUTS)
SENTINEL, IGNORED = -200, -100
# Another order of summation moves a gradient by up to 2e-6 of its norm; where the true gradient is
# zero (CLIP's key biases, to which softmax is blind) it leaves 3e-8.
GRADIENT, ZERO = 2e-5, 3e-7


def free_token() -> int:
    """An id that occurs in no text and no answer: our placeholder."""
    golden = read("e2e")
    used = {
        token
        for name, value in golden.items()
        if name.endswith(("ids", "labels"))
        for token in value.flatten().tolist()
    }
    return max(set(range(config("e2e", "llm", "vocab_size"))) - used)


IMAGE = free_token()


def tokens_per_image() -> int:
    return read("e2e")["projected_image_features_sample0"].shape[0]


@cache
def loaded() -> tuple[EagleMixForConditionalGeneration, Plan]:
    """The model, shared by the tests, which must not change it; and where its weights came from."""
    grid = round(tokens_per_image() ** 0.5)
    llm = config("e2e", "llm")
    model = release_model(config("e2e", "vision"), grid, llm, image_token_id=IMAGE)
    rules = release_rules(model.config, llm["vocab_size"])
    return model, load(model, official(read("e2e")), rules)


def model() -> EagleMixForConditionalGeneration:
    return loaded()[0]


def prompts(
    ids: Tensor, labels: Tensor, mask: Tensor | None = None, limit: int | None = None
) -> dict:
    """Official ids and labels (B,L) -> ours: placeholders written out, cut to `limit`, padded."""
    mask = torch.ones_like(ids) if mask is None else mask
    tokens, targets = [], []
    for row, answer, kept in zip(ids, labels, mask.bool(), strict=True):
        times = torch.where(row[kept] == SENTINEL, tokens_per_image(), 1)
        row, answer = row[kept].repeat_interleave(times), answer[kept].repeat_interleave(times)
        tokens.append(row.where(row != SENTINEL, IMAGE)[:limit])
        targets.append(answer.where(row != SENTINEL, IGNORED)[:limit])
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True),
    }


@cache
def batch() -> dict[str, Tensor]:
    """Two samples with an image each and one without, cut where the release cuts."""
    golden, limit = read("e2e"), config("e2e", "tokenizer_model_max_length")
    fields = (golden[key] for key in ("input_ids", "labels", "attention_mask"))
    return prompts(*fields, limit=limit)


def real(logits: Tensor) -> Tensor:
    """Rows of the batch's logits that are no padding."""
    return logits[batch()["attention_mask"].bool()]


@cache
@torch.enable_grad()
def trained() -> dict[str, Tensor]:
    """A pass over the batch, forward and backward."""
    net, plan = loaded()
    with recorded({"llm": net.model.language_model.layers[0]}) as seen:
        result = net(**batch(), pixel_values=read("e2e")["images_u8"])
    result.loss.backward()
    mask = batch()["attention_mask"]
    parameters = dict(net.named_parameters())
    return {
        "prepared.labels": batch()["labels"],
        "prepared.attention_mask": mask,
        # The release pads with zeros, we with the embedding of a token that nobody attends to.
        "prepared.inputs_embeds_sample0": seen["llm.input"][0] * mask[0, :, None],
        "image": result.image_hidden_states,
        "projected_image_features_sample0": result.image_hidden_states[: tokens_per_image()],
        "logits": result.logits,
        "loss": result.loss[None],
        **{f"grad.{key}": parameters[name].grad for key, (name, _) in plan.placed.items()},
    }


@torch.no_grad()
def two_images() -> dict[str, Tensor]:
    golden = read("e2e")
    fed = prompts(golden["two_images.input_ids"], golden["two_images.labels"])
    result = model()(**fed, pixel_values=golden["images_u8"])
    last = {
        name: result.logits[:, -golden[name].shape[1] :]
        for name in NAMES
        if name.startswith("two_images.logits_last")
    }
    return {**last, "two_images.loss": result.loss[None]}


@torch.no_grad()
def text_only() -> dict[str, Tensor]:
    golden = read("e2e")
    ids, labels = (
        golden[key][2:3, : golden["text_only.logits"].shape[1]] for key in ("input_ids", "labels")
    )
    result = model()(input_ids=ids, labels=labels)
    return {"text_only.logits": result.logits, "text_only.loss": result.loss[None]}


@torch.no_grad()
def generate() -> dict[str, Tensor]:
    golden = read("e2e")
    ids = golden["generate.prompt_ids"]
    prompt = prompts(ids, ids)["input_ids"]
    result = model().generate(
        input_ids=prompt,
        pixel_values=golden["images_u8"][: (ids == SENTINEL).sum()],
        max_new_tokens=golden["generate.greedy_ids"].shape[1],
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return {
        "generate.greedy_ids": result.sequences[:, prompt.shape[1] :],
        "generate.step_logits": torch.cat(result.logits),
    }


@cache
def ours() -> dict[str, Tensor]:
    return trained() | two_images() | text_only() | generate()


def test_no_golden_tensor_is_left_out():
    assert set(NAMES) <= set(ours())


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_release(name):
    golden, value = read("e2e")[name], ours()[name]
    if name == "logits":
        golden, value = real(golden), real(value)
    if "logits" in name:
        torch.testing.assert_close(value, golden, atol=LOGIT, rtol=0)
    elif name.endswith("loss"):
        torch.testing.assert_close(value, golden, atol=0, rtol=LOSS)
    elif name.startswith("grad."):
        assert distance(value, golden) <= GRADIENT
    else:
        assert_same(value, golden)


def test_every_parameter_has_the_gradient_of_the_release():
    """By its norm. The release's null and zero gradients are of weights that ours does not have."""
    norms = json.loads((GOLDENS / "e2e_grad_norms.json").read_text())
    plan = loaded()[1]
    assert set(norms) == set(plan.placed) | set(plan.ignored)
    assert {key for key, norm in norms.items() if not norm} == set(plan.ignored)
    found = {key: ours()[f"grad.{key}"].double().norm().item() for key in plan.placed}
    wrong = {
        key: (norm, norms[key])
        for key, norm in found.items()
        if not math.isclose(norm, norms[key], rel_tol=GRADIENT, abs_tol=ZERO)
    }
    assert not wrong


# Deliberate mistakes


def pass_with(**changes: Tensor) -> EagleMixCausalLMOutput:
    """The batch through the language model with something changed; the experts' work is done."""
    tokens = trained()["image"].detach().unflatten(0, (-1, tokens_per_image()))
    image = BaseModelOutputWithPooling(pooler_output=list(tokens))
    return model()(**{**batch(), **changes}, mm_encoder_outputs={"image": image})


def gradient_error(**changes: Tensor) -> float:
    """How far the head's gradient is off. (Losses of random models are all alike.)"""
    head = model().lm_head.weight
    (gradient,) = torch.autograd.grad(pass_with(**changes).loss, head)
    return distance(gradient, read("e2e")["grad.lm_head.weight"])


def test_without_a_mistake_nothing_shows():
    assert gradient_error() <= GRADIENT


@torch.no_grad()
def test_image_tokens_one_position_late_would_show(monkeypatch):
    place = EagleMixModel.get_placeholder_mask
    monkeypatch.setattr(
        EagleMixModel, "get_placeholder_mask", lambda *args: place(*args).roll(1, dims=1)
    )
    error = real(pass_with().logits - read("e2e")["logits"]).abs().max()
    assert error > 100 * LOGIT


def test_labels_that_are_not_shifted_would_show():
    assert gradient_error(labels=batch()["labels"].roll(1, dims=1)) > 100 * GRADIENT


def test_learning_the_image_positions_would_show():
    ids, labels = batch()["input_ids"], batch()["labels"]
    assert gradient_error(labels=ids.where(ids == IMAGE, labels)) > 100 * GRADIENT
