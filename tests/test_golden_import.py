"""`eagle-moe import` on the golden weights in the official layout, and the official numbers from
what Auto classes load of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import eagle_moe
from eagle_moe.cli import main
from tests.eagle_release import (
    GOLDENS,
    LOGIT,
    LOSS,
    config,
    entry,
    needs_goldens,
    official,
    read,
)
from tests.official_layout import X5
from tests.official_release import write_weights
from tests.release_tokenizers import write_sentencepiece

eagle_moe.register()
pytestmark = needs_goldens
SENTINEL, IGNORED = -200, -100


def write_golden_release(folder: Path) -> Path:
    """The end-to-end weights as a release; returns the geometry's file, beside the folder."""
    write_sentencepiece(folder, GOLDENS / "tiny_sp.model")
    fields = {
        "model_type": "eagle_llama",
        "image_aspect_ratio": "pad",
        "mm_projector_type": config("e2e", "mm_projector_type"),
        "mm_hidden_size": config("e2e", "mm_hidden_size"),
        "mm_vision_tower": X5,
        "max_position_embeddings": 4096,
        "tokenizer_model_max_length": config("e2e", "tokenizer_model_max_length"),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config("e2e", "llm"),
    }
    (folder / "config.json").write_text(json.dumps(fields))
    write_weights(folder, official(read("e2e")), shards=3)
    vision = config("e2e", "vision")
    sizes: dict[str, tuple[int | None, Any]] = {
        "clip": (vision["clip_input"], vision["clip"]),
        "convnext": (vision["input"], vision["convnext"]),
        "sam": (vision["input"], vision["sam"]),
        "eva02": (vision["input"], vision["eva"]),
        "pix2struct": (None, vision["pix"]),
    }
    entries = {kind: entry(kind, *size) for kind, size in sizes.items()}
    geometry = {
        "canvas": {"size": vision["input"]},
        "experts": {kind: {"view": e["view"], "arch": e["arch"]} for kind, e in entries.items()},
        "fusion": {"grid": round(read("e2e")["projected_image_features_sample0"].shape[0] ** 0.5)},
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(json.loads(json.dumps(geometry))))
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("golden")
    geometry = write_golden_release(folder / "release")
    target = folder / "ours"
    assert main(["import", str(folder / "release"), str(target), "--geometry", str(geometry)]) == 0
    return (
        AutoModelForImageTextToText.from_pretrained(target).eval(),
        AutoProcessor.from_pretrained(target),
    )


def written_out(processor: Any, ids: list[int], fill: list[int]) -> tuple[list[int], list[int]]:
    """Official ids and labels -> ours: each placeholder as often as an image has tokens."""
    times = [processor.image_seq_length if token == SENTINEL else 1 for token in ids]
    own = [processor.image_token_id if token == SENTINEL else token for token in ids]
    return (
        [token for token, n in zip(own, times, strict=True) for _ in range(n)],
        [label for label, n in zip(fill, times, strict=True) for _ in range(n)],
    )


def own_rows(logits: Tensor) -> Tensor:
    """Logits of the release's own vocabulary, without the rows that were added for `<image>`."""
    return logits[..., : config("e2e", "llm", "vocab_size")]


@torch.no_grad()
@pytest.mark.parametrize("sample", range(3))
def test_logits_of_each_sample(imported, sample):
    model, processor = imported
    golden = read("e2e")
    if sample >= len(golden["input_ids"]):
        pytest.skip("no such sample in this golden set")
    kept = golden["attention_mask"][sample].bool()
    ids = golden["input_ids"][sample][kept].tolist()
    tokens, _ = written_out(processor, ids, ids)
    tokens = tokens[: processor.tokenizer.model_max_length]
    # A sample without a placeholder uses up an image in the release; the golden's last is text.
    images = golden["images_u8"][sample : sample + 1] if SENTINEL in ids else None
    logits = model(input_ids=torch.tensor([tokens]), pixel_values=images).logits
    expected = golden["logits"][sample][golden["prepared.attention_mask"][sample].bool()]
    assert own_rows(logits)[0].shape == expected.shape
    assert (own_rows(logits)[0] - expected).abs().max() < LOGIT


@torch.no_grad()
def test_two_images_in_one_prompt(imported):
    model, processor = imported
    golden = read("e2e")
    ids, labels = (golden[f"two_images.{name}"][0].tolist() for name in ("input_ids", "labels"))
    tokens, answers = written_out(processor, ids, labels)
    answers = [
        IGNORED if token == processor.image_token_id else answer
        for token, answer in zip(tokens, answers, strict=True)
    ]
    logits = own_rows(
        model(input_ids=torch.tensor([tokens]), pixel_values=golden["images_u8"]).logits
    )
    expected = golden["two_images.logits_last16"]
    assert (logits[:, -expected.shape[1] :] - expected).abs().max() < LOGIT
    loss = F.cross_entropy(logits[0, :-1], torch.tensor(answers[1:]), ignore_index=IGNORED)
    assert loss.item() == pytest.approx(golden["two_images.loss"].item(), rel=LOSS)


def test_greedy_answer(imported):
    """The tokens that were added are never written, though nothing else forbids them."""
    model, processor = imported
    golden = read("e2e")
    ids = golden["generate.prompt_ids"][0].tolist()
    tokens, _ = written_out(processor, ids, ids)
    expected = golden["generate.greedy_ids"]
    output = model.generate(
        input_ids=torch.tensor([tokens]),
        pixel_values=golden["images_u8"][:1],
        max_new_tokens=expected.shape[1],
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[:, len(tokens) :].tolist() == expected.tolist()
    steps = own_rows(torch.cat(output.logits))
    assert (steps - golden["generate.step_logits"].reshape(steps.shape)).abs().max() < LOGIT


def test_a_tower_in_another_place_is_not_missed(tmp_path, imported):
    """SAM and EVA-02 have one map size here; their keys tell them apart, in whatever order."""
    release = tmp_path / "release"
    geometry = write_golden_release(release)
    path = release / "config.json"
    names = X5.split(";")
    names[2], names[3] = names[3], names[2]
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "mm_vision_tower": ";".join(names)})
    )
    assert main(["import", str(release), str(tmp_path / "ours"), "--geometry", str(geometry)]) == 2
    assert not (tmp_path / "ours").exists()
