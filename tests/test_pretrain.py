"""How the mini models start: tokenizer, corpus, and eyes that learn their pretext tasks."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from eagle_moe.experts import ExpertSpec, build_expert
from eval.skills import SKILLS, make_scene
from eval.skills.scene import GRID
from train.pretrain.corpus import write_corpus
from train.pretrain.experts import pretrain_expert
from train.pretrain.pretexts import PRETEXTS, stack
from train.pretrain.tokenizer import build_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize(
    "text",
    [
        "USER: what is the top word ASSISTANT: isle</s>",
        "the there her red redder [red:bar] Where? 7,9%\n\ttop left",
        "..is.[red:bar].to...the.\nhow high is red",
        "",
    ],
)
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("skill", SKILLS)
def test_a_transcript_has_a_token_per_cell(tokenizer, skill):
    """What stands where the image will stand must be as long as the image."""
    for index in range(200):
        scene = make_scene(skill, "train", index, paint=False)
        text = f"USER: {scene.transcript}\n{scene.questions[0].question}"
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        assert tokens[2 : 2 + GRID * GRID] == scene.cells
        assert tokens[2 + GRID * GRID] == "\n"


def test_image_is_one_special_token(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    for one in (tokenizer, saved):
        assert len(one("<image>").input_ids) == 1
        assert one.image_token_id == one("<image>").input_ids[0]
        assert one("where is <image> the red circle") == tokenizer(
            "where is <image> the red circle"
        )


def test_corpus(tmp_path):
    path = write_corpus(tmp_path / "corpus.jsonl", documents=10, copies=5)
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    assert len({row["id"] for row in rows}) == 15
    for row in rows[10:]:
        human, gpt = row["conversations"]
        assert human["value"] == gpt["value"] + "\ntranscribe"
    assert path.read_bytes() == write_corpus(tmp_path / "again", 10, 5).read_bytes()


def test_every_tiny_expert_with_a_task_learns_it(tmp_path):
    """A few steps on a few scenes: every parameter of the expert moves, and the files load."""
    for kind in PRETEXTS:
        out = pretrain_expert(f"{kind}-tiny", tmp_path / kind, steps=2, batch_size=8, scenes=20)
        spec = ExpertSpec.parse(json.loads((out / "expert.json").read_text()), "test")
        expert = build_expert(spec)
        expert.load_state_dict(load_file(out / "expert.safetensors"))
        told = json.loads((out / "pretext.json").read_text())
        assert 0 <= told["score"] <= 1


@pytest.mark.parametrize(("kind", "least"), [("eva02", 0.5), ("pix2struct", 0.05)])
def test_learning_is_real(tmp_path, kind, least):
    """Eighty steps lift the held-out score well above that of the untrained expert."""
    out = pretrain_expert(f"{kind}-tiny", tmp_path, steps=80, batch_size=16, scenes=640)
    told = json.loads((out / "pretext.json").read_text())
    assert told["score"] > told["untrained"] + least


def test_scores_tell_right_from_wrong():
    """A map that holds the answers scores 1, and an empty one does not."""
    scenes = [make_scene("text", "test", index) for index in range(12)]
    batch = stack(scenes)
    pretext = PRETEXTS["pix2struct"](len(pretext_symbols := PRETEXTS["pix2struct"].symbols) + 1)
    with torch.no_grad():
        pretext.head.weight.copy_(torch.eye(len(pretext_symbols) + 1))
        pretext.head.bias.zero_()
    target = pretext.table[batch.cells]
    right = torch.nn.functional.one_hot(target, len(pretext_symbols) + 1).float()
    maps = right.transpose(1, 2).unflatten(2, (GRID, GRID))
    assert pretext.score(maps, batch) == 1.0
    assert pretext.score(torch.zeros_like(maps), batch) == 0.0
    assert pretext.loss(maps * 50, batch) < 1e-3 < pretext.loss(torch.zeros_like(maps), batch)


def test_an_expert_without_a_task_is_named(tmp_path):
    with pytest.raises(ValueError, match="dinov2.*no pretext task"):
        pretrain_expert("dinov2-tiny", tmp_path, steps=1)


def test_a_word_that_begins_or_ends_like_a_known_one_is_spelled(tokenizer):
    for word in ("isle", "redder", "scored", "whatis"):
        assert tokenizer.tokenize(f" {word}") == [" ", *word]
    assert tokenizer.tokenize("what is red") == ["what", " is", " red"]
