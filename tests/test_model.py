from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import CANVAS, make_config, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from eagle_moe.model import EagleMixForConditionalGeneration, EagleMixVisionModel

TINY = ("clip-tiny", "convnext-tiny", "pix2struct-tiny", "eva02-tiny", "sam-tiny", "dinov2-tiny")
TOKENS = 16


def canvases(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, CANVAS, CANVAS), dtype=torch.uint8, generator=generator)


def prompt(*pieces: int | str) -> torch.Tensor:
    """Token ids (1,L): numbers are text, "image" is a run of placeholders."""
    ids: list[int] = []
    for piece in pieces:
        ids += [3] * TOKENS if piece == "image" else [int(piece)]
    return torch.tensor([ids])


def as_llama(model: EagleMixForConditionalGeneration) -> LlamaForCausalLM:
    """The language model alone, as transformers has it."""
    llama = LlamaForCausalLM(model.config.text_config).eval()
    llama.model.load_state_dict(model.model.language_model.state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    return llama


def by_hand(model: EagleMixForConditionalGeneration, ids: torch.Tensor, pixels: torch.Tensor):
    """Logits from the written-out recipe: resize, norm, concatenate, project, splice, Llama."""
    vision, llama = model.model.vision_tower, as_llama(model)
    columns = []
    for name, expert in vision.towers.items():
        map_ = F.interpolate(
            expert(expert.view(pixels)), (4, 4), mode="bilinear", align_corners=True
        )
        norm = vision.fusion.to_tokens.norms[name]
        tokens = map_.flatten(2).transpose(1, 2)
        columns.append(F.layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias))
    first, _, second = model.model.multi_modal_projector.layers
    image = F.linear(torch.cat(columns, -1), first.weight, first.bias)
    image = F.linear(F.gelu(image), second.weight, second.bias).flatten(0, 1)
    embeds = llama.model.embed_tokens(ids)
    rows = iter(image)
    for i, token in enumerate(ids[0].tolist()):
        if token == 3:
            embeds[0, i] = next(rows)
    return llama(inputs_embeds=embeds).logits


@torch.no_grad()
def test_forward_is_the_written_out_recipe(tiny_model):
    ids, pixels = prompt(1, 40, "image", 50, "image", 60), canvases(2)
    logits = tiny_model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(logits, by_hand(tiny_model, ids, pixels), rtol=1e-4, atol=1e-4)
    # The comparison must see a mistake: images in the wrong order.
    wrong = by_hand(tiny_model, ids, pixels.flip(0))
    assert (logits - wrong).abs().max() > 0.1


@torch.no_grad()
def test_text_only_skips_the_experts_and_is_the_plain_llm(tiny_model, monkeypatch):
    monkeypatch.setattr(EagleMixVisionModel, "encode", lambda *_: pytest.fail("experts were run"))
    ids = prompt(1, 40, 41, 42)
    expected = as_llama(tiny_model)(ids).logits
    for no_images in (None, canvases(0)):
        logits = tiny_model(input_ids=ids, pixel_values=no_images).logits
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(("images", "features"), [(1, 16), (3, 48)])
def test_mismatch_names_both_numbers(tiny_model, images, features):
    with pytest.raises(ValueError, match=rf"32 image placeholder.*give {features} \(16 each\)"):
        tiny_model(input_ids=prompt(1, "image", 9, "image"), pixel_values=canvases(images))


def test_placeholders_without_images_are_an_error(tiny_model):
    with pytest.raises(ValueError, match=r"16 image placeholder.*give 0 \(16 each\)"):
        tiny_model(input_ids=prompt(1, "image", 9))


def test_wrong_canvas_names_both_shapes(tiny_model):
    with pytest.raises(ValueError, match=r"\(num_images, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        tiny_model.get_image_features(canvases(1)[..., :32, :32])


def test_one_source_of_text_and_of_images(tiny_model):
    ids, pixels = prompt(1, "image"), canvases(1)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        tiny_model(pixel_values=pixels)
    encoded = {"image": tiny_model.get_image_features(pixels)}
    with pytest.raises(ValueError, match="either pixel_values or mm_encoder_outputs"):
        tiny_model(input_ids=ids, pixel_values=pixels, mm_encoder_outputs=encoded)


@torch.no_grad()
def test_image_features(tiny_model):
    features = tiny_model.get_image_features(canvases(3))
    assert features.last_hidden_state.shape == (3, TOKENS, 192)
    assert [tuple(tokens.shape) for tokens in features.pooler_output] == [(TOKENS, 32)] * 3
    assert isinstance(tiny_model.get_image_features(canvases(1), return_dict=False), tuple)


@torch.no_grad()
def test_maps_do_not_depend_on_batch_neighbours():
    vision = make_model(make_config(TINY)).model.vision_tower
    together = vision.encode(canvases(3))
    for i, pixels in enumerate(canvases(3).split(1)):
        for name, alone in vision.encode(pixels).items():
            torch.testing.assert_close(together[name][i : i + 1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_precomputed_features_and_embeddings_equal_pixels(tiny_model):
    ids, pixels = prompt(1, 40, "image", 9), canvases(1)
    expected = tiny_model(input_ids=ids, pixel_values=pixels).logits
    encoded = {"image": tiny_model.get_image_features(pixels)}
    embeds = tiny_model.get_input_embeddings()(ids)
    for inputs in (
        {"input_ids": ids, "mm_encoder_outputs": encoded},
        {"inputs_embeds": embeds, "mm_encoder_outputs": encoded},
        {"inputs_embeds": embeds, "pixel_values": pixels},
    ):
        torch.testing.assert_close(tiny_model(**inputs).logits, expected)


@torch.no_grad()
def test_logits_to_keep(tiny_model):
    inputs = {"input_ids": prompt(1, "image", 9, 8, 7), "pixel_values": canvases(1)}
    every = tiny_model(**inputs).logits
    torch.testing.assert_close(tiny_model(**inputs, logits_to_keep=2).logits, every[:, -2:])
    places = torch.tensor([0, 17])
    torch.testing.assert_close(tiny_model(**inputs, logits_to_keep=places).logits, every[:, places])


def test_loss_is_next_token_cross_entropy_over_kept_labels(tiny_model):
    ids = prompt(1, "image", 50, 60, 70)
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = ids[0, -2:]
    inputs = {"input_ids": ids, "pixel_values": canvases(1), "labels": labels}
    output = tiny_model(**inputs)
    expected = F.cross_entropy(output.logits[0, -3:-1], ids[0, -2:])
    torch.testing.assert_close(output.loss, expected)
    scaled = tiny_model(**inputs, num_items_in_batch=torch.tensor(8)).loss
    torch.testing.assert_close(scaled, expected * 2 / 8)


def test_outputs_as_tuple(tiny_model):
    inputs = {"input_ids": prompt(1, "image"), "pixel_values": canvases(1)}
    output = tiny_model(**inputs, return_dict=False)
    torch.testing.assert_close(output[0], tiny_model(**inputs).logits)


GENERATE = {"max_new_tokens": 6, "do_sample": False}


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}],
)
def test_any_cache_gives_the_same_tokens(tiny_model, options):
    inputs = {"input_ids": prompt(1, "image", 9, "image", 8), "pixel_values": canvases(2)}
    expected = tiny_model.generate(**inputs, **GENERATE)
    assert torch.equal(tiny_model.generate(**inputs, **GENERATE, **options), expected)


@torch.no_grad()
def test_generate_looks_once_and_keeps_one_row_of_logits(tiny_model, monkeypatch):
    looks, rows = [], []
    encode = EagleMixVisionModel.encode
    monkeypatch.setattr(
        EagleMixVisionModel, "encode", lambda *args: looks.append(1) or encode(*args)
    )
    hook = tiny_model.lm_head.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[1]))
    inputs = {"input_ids": prompt(1, "image", 9), "pixel_values": canvases(1)}
    tiny_model.generate(**inputs, **GENERATE)
    hook.remove()
    assert looks == [1]
    assert set(rows) == {1}


@torch.no_grad()
def test_placeholders_are_never_generated(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.lm_head.weight[3] = 50 * model.lm_head.weight.abs().max()
    ids = prompt(1, "image", 9)
    for sign in (1, -1):
        model.lm_head.weight[3] *= sign
        tokens = model.generate(input_ids=ids, pixel_values=canvases(1), **GENERATE)
        assert 3 not in tokens[0, ids.shape[1] :]


@torch.no_grad()
def test_beams_carry_their_own_images(tiny_model):
    ids = torch.cat([prompt(1, "image", 9), prompt(1, "image", 70)])
    options = {**GENERATE, "num_beams": 2}
    together = tiny_model.generate(input_ids=ids, pixel_values=canvases(2), **options)
    for i, pixels in enumerate(canvases(2).split(1)):
        alone = tiny_model.generate(input_ids=ids[i : i + 1], pixel_values=pixels, **options)
        assert torch.equal(together[i, : alone.shape[1]], alone[0])


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
@pytest.mark.parametrize("preset", TINY)
def test_any_expert_alone_makes_a_model(preset):
    model = make_model(make_config((preset,)))
    tokens = model.generate(
        input_ids=prompt(1, "image", 9), pixel_values=canvases(1), max_new_tokens=2
    )
    assert tokens.shape[1] == TOKENS + 4


def test_order_of_experts_is_part_of_the_model(tiny_model):
    assert list(tiny_model.model.vision_tower.towers) == ["clip", "convnext"]
    swapped = make_config(("convnext-tiny", "clip-tiny"))
    assert [spec.name for spec in swapped.vision_config.expert_specs] == ["convnext", "clip"]


TIMM_EVA02 = {  # rotary tables and a zero key bias, in buffers that are not saved
    "kind": "timm:eva02_tiny_patch14_224",
    "name": "eva",
    "view": {"size": 56},
    "arch": {"options": {"depth": 1, "img_size": 56}},
}


@torch.no_grad()
@pytest.mark.parametrize("experts", [TINY, (TIMM_EVA02,)], ids=["ours", "timm"])
def test_saved_and_loaded_models_are_equal_to_the_last_buffer(tmp_path, experts):
    model = make_model(make_config(experts))
    model.save_pretrained(tmp_path)
    loaded, report = EagleMixForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values())
    for kind in ("named_parameters", "named_buffers", "named_non_persistent_buffers"):
        expected, actual = dict(getattr(model, kind)()), dict(getattr(loaded, kind)())
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name
    inputs = {"input_ids": prompt(1, "image", 9), "pixel_values": canvases(1)}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_missing_weights_are_drawn_by_the_owners_rule(tmp_path):
    """transformers draws what a checkpoint lacks; the expert's own rule must decide how."""
    model = make_model(make_config(TINY))
    model.save_pretrained(
        tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "towers" not in k}
    )
    loaded = EagleMixForConditionalGeneration.from_pretrained(tmp_path)
    for name, expert in loaded.model.vision_tower.towers.items():
        for part, value in [*expert.named_parameters(), *expert.named_buffers()]:
            assert value.isfinite().all(), f"{name}.{part}"
    projection = loaded.model.vision_tower.towers["clip"].layers[0].mlp.fc1.weight
    bound = (6 / sum(projection.shape)) ** 0.5  # Xavier's, not a normal of 0.02
    assert 0.9 * bound < projection.abs().max() <= bound
    kept = loaded.model.multi_modal_projector.layers[0].weight
    assert torch.equal(kept, model.model.multi_modal_projector.layers[0].weight)


def test_fresh_connectors_are_drawn_as_nn_linear(tiny_config):
    torch.manual_seed(0)
    fresh = EagleMixForConditionalGeneration(tiny_config).model.multi_modal_projector.layers[0]
    bound = fresh.in_features**-0.5
    assert 0.9 * bound < fresh.weight.abs().max() <= bound


def test_built_on_meta_without_touching_memory():
    with torch.device("meta"):
        model = EagleMixForConditionalGeneration(make_config(TINY))
    assert {p.device.type for p in model.parameters()} == {"meta"}


@torch.no_grad()
def test_bf16(tiny_folder, tiny_model):
    model = EagleMixForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids, pixels = prompt(1, "image", 9), canvases(1)
    views = {n: e.view(pixels) for n, e in model.model.vision_tower.towers.items()}
    exact = {n: e.view(pixels) for n, e in tiny_model.model.vision_tower.towers.items()}
    for name, view in views.items():  # low precision starts after normalisation
        assert torch.equal(view, exact[name].bfloat16())
    logits = model(input_ids=ids, pixel_values=pixels).logits
    expected = tiny_model(input_ids=ids, pixel_values=pixels).logits
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_parts_may_differ_in_dtype(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.model.vision_tower.towers.bfloat16()
    model(input_ids=prompt(1, "image"), pixel_values=canvases(1))
    model.model.language_model.bfloat16(), model.lm_head.bfloat16()
    model(input_ids=prompt(1, "image"), pixel_values=canvases(1))


class Syncs(TorchDispatchMode):
    """Collects the operations whose result or shape the host would have to wait for."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[-1].startswith(self.WAITING):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_nothing_waits_for_the_host_between_canvas_and_image_tokens():
    model = make_model(make_config(TINY))
    with Syncs() as syncs:
        model.get_image_features(canvases(2))
    assert syncs.seen == []
    with Syncs() as syncs:
        torch.ones(1).item()
    assert syncs.seen  # the counter does see one


@torch.no_grad()
def test_image_features_compile_as_one_graph(tiny_model):
    model = tiny_model
    compiled = torch.compile(model.get_image_features, fullgraph=True, backend="eager")
    actual, expected = compiled(canvases(1)), model.get_image_features(canvases(1))
    torch.testing.assert_close(actual.pooler_output[0], expected.pooler_output[0])


@torch.no_grad()
def test_attention_implementation_reaches_the_llm(tiny_folder, tiny_model):
    eager = EagleMixForConditionalGeneration.from_pretrained(
        tiny_folder, attn_implementation="eager"
    )
    assert eager.model.language_model.config._attn_implementation == "eager"
    assert tiny_model.model.language_model.config._attn_implementation == "sdpa"
    inputs = {"input_ids": prompt(1, "image", 9), "pixel_values": canvases(1)}
    expected = tiny_model(**inputs).logits
    torch.testing.assert_close(eager(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "text_config",
    [
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
        {
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    ],
)
def test_any_causal_llm_with_tied_embeddings(tmp_path, text_config):
    config = make_config(text_config={**text_config, "vocab_size": 260}, tie_word_embeddings=True)
    model = make_model(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = EagleMixForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    inputs = {"input_ids": prompt(1, "image", 9), "pixel_values": canvases(1)}
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_llms_that_bend_their_logits_are_refused():
    with pytest.raises(ValueError, match=r"gemma2 .*final_logit_softcapping=30"):
        EagleMixForConditionalGeneration(make_config(text_config={"model_type": "gemma2"}))


def test_what_transformers_and_engines_look_up(tiny_model):
    base = tiny_model.model
    assert tiny_model.base_model is base
    assert tiny_model.get_decoder() is base.language_model
    assert base.get_decoder() is base.language_model
    assert base.get_encoder(modality="image") is base.vision_tower
    assert base.vision_tower.get_input_embeddings() is None
    assert tiny_model.get_output_embeddings() is tiny_model.lm_head
    assert {"CLIPExpert", "CLIPEncoderLayer", "LlamaDecoderLayer"} <= tiny_model._no_split_modules
    # Serving engines take "moe" in a class name, or a submodule `experts`, for a sparse MoE.
    assert "moe" not in type(tiny_model).__name__.lower()
    assert not any(name.endswith("experts") for name, _ in tiny_model.named_modules())
    assert not any(b.numel() and n.endswith("experts") for n, b in tiny_model.named_buffers())


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
