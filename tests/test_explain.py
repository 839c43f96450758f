"""eagle_moe/explain.py: silenced experts and weighed maps, against what is computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchFeature

from eagle_moe.explain import (
    Asked,
    encode,
    mean_maps,
    prepare,
    reference_means,
    score,
    silence,
    weigh,
)
from eagle_moe.fusion import FUSIONS
from tests.conftest import make_config, make_model
from tests.model_inputs import canvases
from train.data.labels import Encoder
from train.data.records import Record

EXPERTS = ("clip-tiny", "convnext-tiny", "sam-tiny")
WORDS = ("red", "a long answer", "7")


def mixture(experts: tuple[str, ...] = EXPERTS, **fusion: Any) -> Any:
    config = make_config(experts)
    vision = config.vision_config.to_dict()
    vision["fusion"] = {"kind": "channel_concat", "grid": 4} | fusion
    return make_model(make_config(experts, vision_config=vision))


@pytest.fixture(scope="module")
def model() -> Any:
    return mixture(norm="layernorm")


@pytest.fixture(scope="module")
def images(make_picture) -> list[Any]:
    return [make_picture(seed=seed) for seed in range(len(WORDS))]


@pytest.fixture(scope="module")
def make_picture() -> Any:
    from torchvision.transforms.functional import to_pil_image

    return lambda seed: to_pil_image(canvases(1, seed)[0])


def question(image: Any, text: str = "what is it") -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def asked(tiny_processor, images) -> Asked:
    return prepare(tiny_processor, [question(image) for image in images], WORDS)


@pytest.fixture(scope="module")
def reference() -> Tensor:
    return canvases(5, seed=9)


def log_probs(model: Any, asked: Asked) -> list[float]:
    """By hand: one item at a time, unpadded, from its pixels, one token after the other."""
    found = []
    for row in range(len(asked.input_ids)):
        length = int(asked.attention_mask[row].sum())
        ids, mask = asked.input_ids[row, :length], asked.answer_mask[row, :length]
        with torch.no_grad():
            logits = model(input_ids=ids[None], pixel_values=asked.canvases[row : row + 1]).logits
        logits[..., model.config.image_token_id] = -torch.inf
        steps = torch.log_softmax(logits[0].double(), -1)
        answer = [place for place in range(length) if mask[place]]
        found.append(sum(float(steps[place - 1, ids[place]]) for place in answer))
    return found


def hooked(model: Any, name: str, output: Tensor, asked: Asked) -> list[float]:
    """As `log_probs`, with an expert that gives `output` (C,h,w) whatever it sees."""
    tower = model.model.vision_tower.towers[name]
    handle = tower.register_forward_hook(lambda module, inputs, x: output.expand_as(x))
    try:
        return log_probs(model, asked)
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", list(FUSIONS))
def test_silencing_is_an_expert_that_always_gives_its_mean_map(kind, asked, reference):
    model = mixture(kind=kind)
    tokens = model.config.num_image_tokens
    asked = widen(asked, tokens, model.config.image_token_id)
    with torch.no_grad():
        of_reference = model.model.vision_tower.encode(reference)
        means = mean_maps([encode(model, reference[:2]), encode(model, reference[2:])])
        maps = encode(model, asked.canvases)
        for name in maps:
            expected = hooked(model, name, of_reference[name].mean(0), asked)
            given = score(model, asked, silence(maps, means, {name})).log_prob.tolist()
            assert given == pytest.approx(expected, abs=1e-4)
            # deliberate mistakes: nothing silenced, zeros instead of the mean
            assert given != pytest.approx(log_probs(model, asked), abs=1e-3)
            zeros = torch.zeros_like(of_reference[name][0])
            assert given != pytest.approx(hooked(model, name, zeros, asked), abs=1e-3)
        assert score(model, asked, maps).log_prob.tolist() == pytest.approx(
            log_probs(model, asked), abs=1e-4
        )


def widen(asked: Asked, tokens: int, image_token: int) -> Asked:
    """The same with `tokens` placeholders per image instead of what the processor writes."""
    rows = []
    for ids, real, answer in zip(
        asked.input_ids, asked.attention_mask, asked.answer_mask, strict=True
    ):
        places = (ids == image_token).nonzero().squeeze(1)
        start, stop = int(places[0]), int(places[-1]) + 1
        rows.append(
            [
                torch.cat([x[:start], x[start : start + 1].expand(tokens), x[stop:]])
                for x in (ids, real, answer)
            ]
        )
    ids, real, answer = (torch.stack(column) for column in zip(*rows, strict=True))
    return Asked(ids, real, answer, asked.canvases)


def test_without_a_norm_the_channels_in_the_fused_tokens_are_replaced_by_their_mean(
    asked, reference
):
    model = mixture(norm="none")
    tower = model.model.vision_tower
    with torch.no_grad():
        fused, of_reference = tower(asked.canvases), tower(reference)
        start = tower.towers["clip"].channels
        channels = slice(start, start + tower.towers["convnext"].channels)
        fused[:, :, channels] = of_reference[:, :, channels].mean(0)
        projected = model.model.multi_modal_projector(fused)
        maps, means = encode(model, asked.canvases), mean_maps([encode(model, reference)])
        given = model.get_image_features(silence(maps, means, {"convnext"}), return_dict=True)
    torch.testing.assert_close(torch.stack(given.pooler_output), projected, atol=1e-4, rtol=1e-4)


def test_the_mean_is_exact_however_images_are_batched(model, reference):
    maps = encode(model, reference)
    expected = {name: x.double().mean(0).float() for name, x in maps.items()}
    for size in (1, 2, 5):
        parts = [{name: x[i : i + size] for name, x in maps.items()} for i in range(0, 5, size)]
        found = mean_maps(parts)
        assert all(torch.equal(found[name], expected[name]) for name in maps)
    # deliberate mistake: a mean of batch means
    uneven = [{name: x[:2] for name, x in maps.items()}, {name: x[2:] for name, x in maps.items()}]
    wrong = {name: sum(part[name].mean(0) for part in uneven) / 2 for name in maps}
    assert not torch.allclose(wrong["clip"], expected["clip"])


def test_a_mean_over_nothing_is_refused():
    with pytest.raises(ValueError, match="over no images"):
        mean_maps([])


def test_what_counts_as_the_answer_is_what_training_teaches(tiny_processor, images, asked):
    encoder = Encoder(tiny_processor, None)
    for row, (image, word) in enumerate(zip(images, WORDS, strict=True)):
        said = {"role": "assistant", "content": [{"type": "text", "text": word}]}
        trained = encoder(Record("a", [*question(image), said], ("a.png",), {}, "a"))
        length = int(asked.attention_mask[row].sum())
        assert asked.input_ids[row, :length].tolist() == trained.input_ids.tolist()
        assert asked.answer_mask[row, :length].tolist() == (trained.labels >= 0).tolist()
        assert not asked.answer_mask[row, length:].any()


def test_only_the_last_answer_of_a_conversation_counts(tiny_processor, images):
    earlier = [
        *question(images[0]),
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": "sure"}]},
    ]
    asked = prepare(tiny_processor, [earlier], ["no"])
    told = tiny_processor.tokenizer.decode(asked.input_ids[0][asked.answer_mask[0]])
    assert told == " no</s>"


def test_a_template_that_marks_no_answer_is_refused(tiny_processor, images, monkeypatch):
    plain = tiny_processor.chat_template.replace("{%- generation -%}", "")
    plain = plain.replace("{%- endgeneration -%}", "")
    monkeypatch.setattr(tiny_processor, "chat_template", plain)
    with pytest.raises(ValueError, match=r"chat template: .* \{% generation %\}"):
        prepare(tiny_processor, [question(images[0])], ["red"])


def test_exact_is_what_greedy_decoding_writes(model, tiny_processor, images):
    encoded = tiny_processor.apply_chat_template(
        question(images[0]),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = encoded["input_ids"].shape[1]
    written = model.generate(**BatchFeature(encoded), do_sample=False, max_new_tokens=6)
    maps = encode(model, encoded["pixel_values"])
    mask = torch.arange(written.shape[1])[None] >= length

    def exact(ids: Tensor) -> bool:
        asked = Asked(ids, torch.ones_like(ids), mask, encoded["pixel_values"])
        return bool(score(model, asked, maps).exact)

    assert exact(written)
    for place in range(length, written.shape[1]):
        other = written.clone()
        other[0, place] = 40 + (other[0, place] == 40)
        assert not exact(other)


def test_a_sum_of_weights_is_the_slope_towards_the_mean(model, asked, reference):
    """Finite differences: every map a little nearer to its mean, and single cells of it."""
    maps, means = encode(model, asked.canvases), mean_maps([encode(model, reference)])
    weights = weigh(model, asked, maps, means)
    for name, x in maps.items():
        away = x - means[name]
        total = slope(model, asked, maps, name, away)
        torch.testing.assert_close(weights[name].sum((1, 2)), total, atol=2e-3, rtol=2e-2)
        strongest = weights[name][0].abs().flatten().argmax()
        row, column = divmod(int(strongest), x.shape[-1])
        cell = torch.zeros_like(x)
        cell[..., row, column] = away[..., row, column]
        by_cell = slope(model, asked, maps, name, cell)
        torch.testing.assert_close(weights[name][:, row, column], by_cell, atol=2e-3, rtol=2e-2)
        assert weights[name].shape == (len(WORDS), *x.shape[-2:])


@torch.no_grad()
def slope(model: Any, asked: Asked, maps: Any, name: str, direction: Tensor) -> Tensor:
    step = 5e-3
    ahead, behind = (
        score(model, asked, {**maps, name: maps[name] + sign * step * direction}).log_prob
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * step)


def test_weights_are_gradient_times_input(model, asked, reference):
    """By autograd through the pixels' path, item by item, with a hook on the expert's output."""
    maps, means = encode(model, asked.canvases), mean_maps([encode(model, reference)])
    weights = weigh(model, asked, maps, means)
    seen: dict[str, Tensor] = {}

    def keep(module: Any, inputs: Any, x: Tensor) -> None:
        x.retain_grad()
        seen["map"] = x

    for name in maps:
        handle = model.model.vision_tower.towers[name].register_forward_hook(keep)
        try:
            length = int(asked.attention_mask[1].sum())
            ids, mask = asked.input_ids[1:2, :length], asked.answer_mask[1, :length]
            logits = model(input_ids=ids, pixel_values=asked.canvases[1:2]).logits[0]
            steps = torch.log_softmax(
                logits.index_fill(-1, torch.tensor(model.config.image_token_id), -torch.inf), -1
            )
            steps[:-1].gather(1, ids[0, 1:, None])[mask[1:]].sum().backward()
        finally:
            handle.remove()
            model.zero_grad()
        by_hand = (seen["map"].grad * (seen["map"] - means[name])).sum(1)[0]
        torch.testing.assert_close(weights[name][1], by_hand, atol=1e-4, rtol=1e-3)
        # deliberate mistake: the gradient alone
        assert not torch.allclose(weights[name][1], seen["map"].grad.sum(1)[0], atol=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_counted_from_zero_a_layer_norm_hides_what_mattered(asked, reference):
    """Why inputs are counted from the mean map."""
    experts = ("clip-tiny", "convnext-tiny")
    vision = make_config(experts).vision_config.to_dict()
    grid = encode(mixture(experts), asked.canvases)["clip"].shape[-1]
    vision["fusion"] = {"kind": "channel_concat", "grid": grid, "norm": "layernorm"}
    model = make_model(make_config(experts, vision_config=vision))
    wide = widen(asked, grid**2, model.config.image_token_id)
    maps, means = encode(model, asked.canvases), mean_maps([encode(model, reference)])
    zeros = {name: torch.zeros_like(x) for name, x in means.items()}
    from_zero = weigh(model, wide, maps, zeros)["clip"].abs().max()
    from_mean = weigh(model, wide, maps, means)["clip"].abs().max()
    assert from_zero < 0.01 * from_mean


def test_reference_means_are_over_all_images_and_are_told_of(model, tiny_processor, images):
    heard: list[tuple[int, int]] = []

    def hear(done: int, of: int, what: str) -> None:
        heard.append((done, of))

    found = reference_means(model, tiny_processor.image_processor, images, 2, hear)
    every = tiny_processor.image_processor(images, return_tensors="pt")["pixel_values"]
    for name, expected in mean_maps([encode(model, every)]).items():
        torch.testing.assert_close(found[name], expected)
    assert heard == [(2, 3), (3, 3)]
