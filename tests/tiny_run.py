"""A whole training world in a folder: language model, experts, data, recipe. Tiny and random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlamaForCausalLM

from eagle_moe.checkpoint import save_expert
from tests.conftest import CANVAS, make_config, make_model, make_tokenizer

EXPERTS = ("clip", "convnext")
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def make_world(folder: Path, experts: tuple[str, ...] = EXPERTS) -> dict[str, Any]:
    """Fill `folder`; returns a recipe (a mapping) that trains in three stages there."""
    config = make_config(tuple(f"{name}-tiny" for name in experts), grid=2)
    config.text_config.num_hidden_layers = 1
    model = make_model(config)
    _write_language_model(model, folder / "llm")
    for name, spec in zip(experts, config.vision_config.expert_specs, strict=True):
        state = model.model.vision_tower.towers[name].state_dict()
        save_expert(folder / "experts" / name, spec, state)
    for name, count in (("captions", 8), ("questions", 12), ("test", 6)):
        _write_data(folder / f"{name}.jsonl", count)
    return make_recipe(folder, experts)


def make_recipe(folder: Path, experts: tuple[str, ...] = EXPERTS) -> dict[str, Any]:
    """pre_align (fans out), align, sft: two or three steps of two samples each."""
    text_config = json.loads((folder / "llm" / "config.json").read_text())
    args = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "save_steps": 1}
    return {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "model": {
            "canvas": {"size": CANVAS},
            "experts": [{"preset": f"{name}-tiny", "name": name} for name in experts],
            "fusion": {"kind": "channel_concat", "grid": 2, "norm": "layernorm"},
            "language_model": {"checkpoint": str(folder / "llm"), "config": text_config},
            "template": "short",
        },
        "init": {"experts": {name: str(folder / "experts" / name) for name in experts}},
        "data": {
            name: {"path": str(folder / f"{name}.jsonl")}
            for name in ("captions", "questions", "test")
        },
        "stages": {
            "pre_align": {
                "per_expert": True,
                "trainable": ["experts", "connector"],
                "data": ["questions"],
                "lr": {"connector": 1e-3, "experts": 1e-4},
                "batch_size": 2,
                "args": args,
            },
            "align": {
                "init_from": ["pre_align"],
                "trainable": ["connector"],
                "template": "plain",
                "data": ["captions"],
                "batch_size": 2,
                "args": {**args, "learning_rate": 1e-3},
            },
            "sft": {
                "init_from": ["align"],
                "trainable": ["experts", "connector", "language_model"],
                "data": ["questions"],
                "lr": {"experts.clip": 1e-5},
                "batch_size": 2,
                "eval": {"data": "test", "every": 2, "batch_size": 4},
                "args": {**args, "max_steps": 3, "learning_rate": 1e-3},
            },
        },
    }


def recipe_in(world: Path, out: Path, **sft: Any) -> dict[str, Any]:
    """The world's recipe with another output folder, `sft` alone and from the start if changed."""
    recipe = {**make_recipe(world), "output_dir": str(out)}
    if sft:
        stage = {**recipe["stages"]["sft"], "init_from": [], **sft}
        recipe["stages"] = {"sft": stage}
    return recipe


def _write_language_model(model: torch.nn.Module, folder: Path) -> None:
    llm = LlamaForCausalLM(model.config.text_config)
    llm.model.load_state_dict(model.model.language_model.state_dict())
    llm.lm_head.load_state_dict(model.lm_head.state_dict())
    llm.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def _write_data(path: Path, count: int) -> None:
    lines = []
    for index in range(count):
        name = list(COLOURS)[index % len(COLOURS)]
        picture = f"{name}{index}.png"
        pixels = np.full((24, 32, 3), COLOURS[name], dtype=np.uint8)
        pixels[index % 20 : index % 20 + 4] = 255
        Image.fromarray(pixels).save(path.parent / picture)
        turns = [
            {"from": "human", "value": "<image>\nWhich colour?"},
            {"from": "gpt", "value": name},
        ]
        skill = {"skill": "warm" if name == "red" else "cold"}
        lines.append({"id": str(index), "image": picture, "conversations": turns, **skill})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
