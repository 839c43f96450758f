"""vLLM's and SGLang's checklists for a transformers model (docs/serving.md), item by item.

The engines need a GPU; `tests/emulated_engine.py` does to the model what they do.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, dynamic_module_utils

from eagle_moe.model import EagleMixForConditionalGeneration, EagleMixModel
from eagle_moe.processor import EagleMixProcessor, read_template
from tests.conftest import CANVAS, make_config, make_model
from tests.emulated_engine import ATTENTION, EmulatedEngine, Replaced
from tests.model_inputs import TINY, TOKENS

ROOT = Path(__file__).parent.parent
ENGINES = {"vllm.general_plugins": "vllm", "sglang.srt.plugins": "sglang"}


@pytest.fixture(scope="module")
def model() -> EagleMixForConditionalGeneration:
    """Every expert that there is."""
    return make_model(make_config(TINY))


@pytest.fixture(scope="module")
def processor(tiny_processor) -> EagleMixProcessor:
    return tiny_processor


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder) -> EmulatedEngine:
    return EmulatedEngine(folder)


@pytest.fixture
def prompt(processor, make_image):
    """Two images beside each other, and a question, as engines have them processed."""
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    images = [make_image(), make_image(30, 70, seed=1)]
    return processor(text=text, images=images, return_tensors="pt", return_mm_token_type_ids=True)


# Plugins ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ENGINES)
def test_the_entry_point_registers_again_and_again(group, folder, monkeypatch):
    """And does so without the engine, which is not installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"][group]["eagle_moe"].partition(":")
    register = getattr(import_module(module), name)
    monkeypatch.delattr(transformers, "EagleMixForConditionalGeneration", raising=False)
    (architecture,) = AutoConfig.from_pretrained(folder).architectures
    for _ in range(2):
        register()
        assert getattr(sys.modules["transformers"], architecture) is (
            EagleMixForConditionalGeneration
        )


# What engines look up -----------------------------------------------------------------------------


def test_the_auto_class_gives_the_base_model_and_it_calls_itself_compatible(folder):
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        base = AutoModel.from_config(config)
    assert type(base) is EagleMixModel
    assert base.is_backend_compatible()
    assert config.get_text_config() is config.text_config is not config
    assert config.vision_config is not None
    assert config.image_token_id == 3


def test_the_folder_leads_to_the_base_model(folder, tmp_path, monkeypatch):
    """What engines do without our plugin, if one trusts the folder's code."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    places = json.loads((folder / "config.json").read_text())["auto_map"]
    assert "AutoConfig" in places
    found = dynamic_module_utils.get_class_from_dynamic_module(places["AutoModel"], str(folder))
    assert found is EagleMixModel


def test_no_name_makes_it_a_sparse_mixture_or_a_draft(model):
    names = [type(module).__name__ for module in model.modules()]
    assert not [name for name in names if "moe" in name.lower()]
    assert not [name for name, _ in model.named_modules() if name.split(".")[-1] == "experts"]
    assert not re.fullmatch(r"Eagle\w*ForCausalLM", type(model).__name__)
    assert model.config.model_type != "eagle"


def test_the_only_vocabulary_is_that_of_the_text(model):
    """vLLM takes any embedding with as many rows as any `vocab_size` says for the text's."""

    def sizes(value, name=""):
        if isinstance(value, dict):
            return [size for key, item in value.items() for size in sizes(item, str(key))]
        if isinstance(value, list):
            return [size for item in value for size in sizes(item, name)]
        return [value] if "vocab_size" in name and isinstance(value, int) else []

    (vocabulary,) = sizes(model.config.to_dict())
    alike = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == vocabulary
    ]
    assert alike == [model.get_input_embeddings()]


def test_one_attention_per_layer_index_is_the_engines(engine):
    """Engines count modules with a `layer_idx` whose config asks for their attention."""
    own = [
        module.layer_idx
        for module in engine.model.modules()
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == ATTENTION
        and isinstance(getattr(module, "layer_idx", None), int)
    ]
    assert own == list(range(engine.text_config.num_hidden_layers))


def test_the_plan_for_several_gpus_cuts_the_language_model_alone(model):
    plan = model.model.tp_plan
    linear = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    cut = {name for name in linear if any(re.match(pattern, name) for pattern in plan)}
    assert cut == {name for name in linear if name.startswith("language_model.layers.")}


def test_parts_are_found_by_their_names(engine, model):
    assert engine.model.get_decoder() is engine.model.language_model
    assert engine.model.get_encoder("image") is engine.model.vision_tower
    parameters = inspect.signature(engine.model.get_image_features).parameters
    assert "pixel_values" in parameters
    assert not [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_POSITIONAL]


# Construction and running -------------------------------------------------------------------------


def test_every_layer_that_engines_replace_is_replaced(engine, model):
    parts = {name.split(".")[0] for name in engine.replaced}
    assert parts == {"vision_tower", "multi_modal_projector", "language_model"}
    towers = {name.split(".")[2] for name in engine.replaced if ".towers." in name}
    assert towers == set(model.model.vision_tower.towers)
    left = [
        name
        for name, module in engine.model.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d, nn.LayerNorm)
    ]
    assert not left


def test_buffers_are_those_of_a_model_that_was_loaded(engine, folder):
    loaded = dict(EagleMixForConditionalGeneration.from_pretrained(folder).model.named_buffers())
    built = dict(engine.model.named_buffers())
    assert built.keys() == loaded.keys()
    for name, buffer in built.items():
        torch.testing.assert_close(buffer, loaded[name], rtol=0, atol=0, msg=name)


@torch.no_grad()
def test_hidden_states_are_ours(engine, model, prompt):
    expected = model.model(
        input_ids=prompt["input_ids"], pixel_values=prompt["pixel_values"], use_cache=False
    ).last_hidden_state[0]
    ids, kinds = prompt["input_ids"][0].tolist(), prompt["mm_token_type_ids"][0].bool().tolist()
    hidden = engine.run(ids, kinds, prompt["pixel_values"])
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        hidden @ engine.head.T, model.lm_head(expected), rtol=1e-3, atol=1e-3
    )
    blind = engine.run(ids, kinds, torch.zeros_like(prompt["pixel_values"]))
    assert (blind - expected).abs().max() > 0.1, "the images make no difference"


@torch.no_grad()
def test_hidden_states_of_text_alone_are_ours(engine, model, processor):
    ids = processor(text="hello there")["input_ids"][0]
    expected = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    hidden = engine.run(list(ids), [False] * len(ids), None)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bfloat16_throughout(folder, model, prompt):
    """Engines cast every parameter to one type."""
    engine = EmulatedEngine(folder, torch.bfloat16)
    ids, kinds = prompt["input_ids"][0].tolist(), prompt["mm_token_type_ids"][0].bool().tolist()
    hidden = engine.run(ids, kinds, prompt["pixel_values"])
    assert hidden.dtype == torch.bfloat16
    expected = model.model(
        input_ids=prompt["input_ids"], pixel_values=prompt["pixel_values"]
    ).last_hidden_state[0]
    alike = torch.cosine_similarity(hidden.float(), expected, dim=-1)
    assert alike.min() > 0.95


@torch.no_grad()
def test_image_features_do_not_depend_on_neighbours(engine, prompt):
    """Engines keep the features of an image and use them beside others."""
    together = engine.image_features(prompt["pixel_values"])
    for features, canvas in zip(together, prompt["pixel_values"].split(1), strict=True):
        (alone,) = engine.image_features(canvas)
        assert features.shape == (TOKENS, engine.text_config.hidden_size)
        torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-4)


def test_the_emulation_sees_who_touches_a_weight():
    class Touches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(x, self.proj.weight)

    module = Touches()
    assert module(torch.ones(1, 4)).shape == (1, 4)
    module.proj = Replaced(module.proj)
    assert module.proj(torch.ones(1, 4)).shape == (1, 4)
    with pytest.raises(TypeError):
        module(torch.ones(1, 4))


# Processing ---------------------------------------------------------------------------------------


def test_placeholders_are_found_by_type_by_offset_and_by_run(processor, prompt, make_image):
    sizes = [(32, 48), (70, 30)]
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert sum(counts["num_image_patches"]) == prompt["pixel_values"].shape[0]
    # vLLM: positions by type, cut by the numbers that the processor foretold
    positions = torch.where(prompt["mm_token_type_ids"] == 1)[1]
    by_type = [
        (int(part[0]), int(part[-1])) for part in positions.split(counts["num_image_tokens"])
    ]
    # SGLang: runs of the image token
    ids = prompt["input_ids"][0]
    mine = (ids == processor.image_token_id).int()
    edges = torch.diff(mine, prepend=torch.zeros(1), append=torch.zeros(1))
    starts, ends = torch.where(edges == 1)[0], torch.where(edges == -1)[0] - 1
    by_run = list(zip(starts.tolist(), ends.tolist(), strict=True))
    assert by_type == by_run
    assert [end - start + 1 for start, end in by_run] == [TOKENS, TOKENS]


def test_text_is_replaced_where_vllm_looks_for_it(processor, make_image, monkeypatch):
    """It stops with an error unless the call goes through this method, once per image."""
    seen = []
    method = type(processor).get_text_with_replacements

    def watched(self, text, images_replacements=(), *args, **kwargs):
        seen.extend(images_replacements)
        return method(self, text, images_replacements, *args, **kwargs)

    monkeypatch.setattr(type(processor), "get_text_with_replacements", watched)
    output = processor(
        text="a <image> b <image> c",
        images=[make_image(), make_image(seed=1)],
        return_text_replacement_offsets=True,
    )
    assert seen == [processor.image_token * TOKENS] * 2
    offsets = output["text_replacement_offsets"][0]
    assert [offset["span"] for offset in offsets] == [(2, 9), (12, 19)]


@pytest.mark.parametrize(
    "template", ["vicuna", "llama2", "llama3", "llama3-release", "plain", "yi", "short"]
)
def test_images_beside_each_other_are_two_runs_in_every_template(processor, template, make_image):
    content = [{"type": "image", "image": make_image(seed=seed)} for seed in range(3)]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=read_template(template),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    mine = (inputs["input_ids"][0] == processor.image_token_id).int()
    assert (torch.diff(mine, prepend=torch.zeros(1)) == 1).sum() == 3


def test_the_largest_image_that_engines_try_is_an_image(processor, make_image):
    """They measure memory with a picture of a size that nobody sends, beside others."""
    counts = processor._get_num_multimodal_tokens(image_sizes=([10_000, 10_000],))
    assert counts["num_image_tokens"] == [TOKENS]
    text = processor.image_token * 2
    output = processor(text=text, images=[make_image(2000, 2000)] * 2, return_tensors="pt")
    assert (output["input_ids"] == processor.image_token_id).sum() == 2 * TOKENS
    size = processor.image_processor.size
    assert (size["height"], size["width"]) == (CANVAS, CANVAS)


def test_the_folder_gives_the_processor_that_engines_ask_for(folder):
    loaded = AutoProcessor.from_pretrained(folder)
    assert (loaded.image_token, loaded.image_token_id, loaded.image_token_ids) == (
        "<image>",
        3,
        [3],
    )
    assert copy.deepcopy(loaded).image_seq_length == TOKENS
