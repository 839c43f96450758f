"""Tiny offline fixtures for every test: tokenizer, config, model, processor, images."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from eagle_moe.config import EagleMixConfig
from eagle_moe.image_processor import EagleMixImageProcessor
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.processor import EagleMixProcessor, read_template
from tests.loopback_hub import OWNER, LoopbackHub, without_xet

torch.set_num_threads(1)

# Started in the background or by nohup, these are ignored, and so they would be in every process
# that a test starts to interrupt it.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

CANVAS = 64
SPECIAL = ("<unk>", "<s>", "</s>", "<image>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level characters, a BOS added in front, `<image>` one special token (id 3)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def make_config(
    experts: tuple[str | dict, ...] = ("clip-tiny", "convnext-tiny"),
    grid: int = 4,
    **changes: object,
) -> EagleMixConfig:
    """A two-layer Llama of width 32 behind tiny experts; `grid`**2 tokens per image.

    A preset `<kind>-tiny` is called `<kind>` in the model.
    """
    fields: dict = {
        "vision_config": {
            "canvas_size": CANVAS,
            "experts": list(experts),
            "fusion": {"kind": "channel_concat", "grid": grid, "norm": "layernorm"},
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": len(make_tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "connector": {"kind": "mlp"},
        "image_token_id": SPECIAL.index("<image>"),
    }
    return EagleMixConfig(**{**fields, **changes})


def make_model(config: EagleMixConfig, seed: int = 0) -> EagleMixForConditionalGeneration:
    """Random weights large enough that every part shows in the output (defaults may be vacuous)."""
    torch.manual_seed(seed)
    model = EagleMixForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_config() -> EagleMixConfig:
    return make_config()


@pytest.fixture(scope="session")
def tiny_model(tiny_config: EagleMixConfig) -> EagleMixForConditionalGeneration:
    """Shared by the session in eval mode: a test that changes it must make its own."""
    return make_model(tiny_config)


@pytest.fixture(scope="session")
def tiny_processor(
    tokenizer: PreTrainedTokenizerFast, tiny_config: EagleMixConfig
) -> EagleMixProcessor:
    return EagleMixProcessor(
        EagleMixImageProcessor(size={"height": CANVAS, "width": CANVAS}),
        tokenizer,
        image_seq_length=tiny_config.num_image_tokens,
        chat_template=read_template("short"),
    )


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: EagleMixForConditionalGeneration,
    tiny_processor: EagleMixProcessor,
) -> Path:
    """Model and processor saved side by side, as a release is."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def make_image() -> Callable[..., Image.Image]:
    """`make_image(width, height, seed)`: blocks of random colours, different for each seed."""

    def make(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)

    return make


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """An empty Hub on this machine."""
    with LoopbackHub() as hub, without_xet():
        yield hub


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    """`hub` as its owner speaks to it."""
    return HfApi(endpoint=hub.url, token=OWNER)
