"""8 and 4 bits: the language model and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from eagle_moe import quantization
from eagle_moe.build import load_model
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import part_of
from eagle_moe.quantization import quantization_config, spare_vision
from tests.conftest import make_config, make_model
from tests.model_inputs import canvases, prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A language model wide enough to be rounded well, and for the 4-bit kernel of a CPU."""
    text = make_config().text_config.to_dict() | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "head_dim": None,
    }
    out = tmp_path_factory.mktemp("wide")
    make_model(make_config(text_config=text)).save_pretrained(out)
    return out


def converted(model: nn.Module) -> set[str]:
    """The parts in which a linear layer's weight is no plain tensor of floats."""
    return {
        part_of(f"{name}.").split(".")[0]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (type(module.weight.data) is not Tensor or not module.weight.is_floating_point())
    }


def nbytes(x: Tensor) -> int:
    """What a tensor takes, packed ones by what they are made of."""
    if not hasattr(x, "__tensor_flatten__"):
        return x.nbytes
    return sum(nbytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])


def language_bytes(model: nn.Module) -> int:
    blocks = model.model.language_model.layers
    return sum(nbytes(each.weight.data) for each in blocks.modules() if isinstance(each, nn.Linear))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = prompt(1, "image", *range(9, 19))
    return model(input_ids=ids, pixel_values=canvases(1)).logits.float()


@pytest.mark.parametrize(
    ("kind", "bits", "most"), [("int8", 8, 0.04), ("nf4", 4, 0.4)], ids=["int8", "nf4"]
)
def test_the_language_model_and_nothing_else(folder, kind, bits, most):
    pytest.importorskip(quantization.LIBRARIES[kind])
    full, small = load_model(folder), load_model(folder, quantize=kind)
    assert converted(full) == set()
    assert converted(small) == {"language_model"}
    assert language_bytes(small) < language_bytes(full) * bits / 32 * 1.25
    before, after = logits(full), logits(small)
    assert 0 < (after - before).norm() < most * before.norm()
    one, other = (
        model.generate(prompt(1, "image", 9), pixel_values=canvases(1), max_new_tokens=4)
        for model in (full, small)
    )
    assert one.shape == other.shape
    if kind == "int8":
        assert torch.equal(one, other)


def test_by_plain_transformers_too_and_saved_and_loaded_again(folder, tmp_path):
    ao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(ao.Int8WeightOnlyConfig())
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
    assert converted(model) == {"language_model"}
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert converted(again) == {"language_model"}
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("skip", [None, ["lm_head", "vision_tower", "multi_modal_projector"]])
def test_what_would_have_been_converted(folder, skip):
    """transformers' own default, and names that do not begin as the model's do."""
    ao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(ao.Int8WeightOnlyConfig(), modules_to_not_convert=skip)
    inherited = PreTrainedModel.from_pretrained.__func__
    model = inherited(EagleMixForConditionalGeneration, folder, quantization_config=config)
    assert converted(model) == {"experts", "connector", "language_model"}


def test_what_a_person_names_is_respected():
    assert spare_vision({"llm_int8_skip_modules": ["a"]}) == {"llm_int8_skip_modules": ["a"]}
    assert spare_vision({"load_in_8bit": True, "llm_int8_skip_modules": None}) == {
        "load_in_8bit": True,
        "llm_int8_skip_modules": list(quantization.SPARED),
    }


def test_mistakes_are_named(tiny_folder, monkeypatch):
    with pytest.raises(ValueError, match='quantize: "int3": give int8 or nf4'):
        load_model(tiny_folder, quantize="int3")
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"nf4 needs bitsandbytes. Install eagle-moe\[quant\]"):
        quantization_config("nf4", torch.float32)
