"""Taking down what produced a score (`eagle_moe.scores.identity`), and what it ran on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from eagle_moe.answer import Answerer, Conversation
from eagle_moe.schema import load_yaml
from eagle_moe.scores.identity import Identity, Task, hash_weights

LIBRARIES = (
    "eagle-moe",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "timm",
    "open_clip_torch",
    "numpy",
    "pillow",
    "lmms_eval",
    "datasets",
    "Levenshtein",
)
RECIPE = "recipe.yaml"
"""Name of the resolved recipe in a checkpoint folder."""


def identify(
    folder: str | Path,
    answerer: Answerer,
    task: Task,
    conversation: Conversation,
    settings: Mapping[str, Any],
    batch_size: int,
    processes: int = 1,
) -> Identity:
    """The identity of a score of checkpoint `folder` on `task`.

    - `conversation`: the first question, whose prompt is kept.
    - `settings`: what the task asks of `Answerer.generate`.
    """
    template = json.dumps(answerer.processor.chat_template, sort_keys=True)
    return Identity(
        weights_sha256=hash_weights(folder),
        model_type=answerer.model.config.model_type,
        recipe=_recipe(Path(folder)),
        task=task,
        template_sha256=hashlib.sha256(template.encode()).hexdigest(),
        prompt=answerer.prompt(conversation),
        decoding=_decoding(answerer, settings),
        batch_size=batch_size,
        processes=processes,
        dtype=str(answerer.model.dtype).removeprefix("torch."),
        device=_device_name(answerer.model.device),
        versions=library_versions(),
    )


def library_versions() -> dict[str, str]:
    """Versions of Python and of every installed library that an answer passes through."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def describe_machine() -> str:
    """The machine in one line: processor, cores that may be used, GPU; no name, no address."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{_processor_name()}, {cores} core{'s' if cores != 1 else ''}"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _recipe(folder: Path) -> dict[str, Any] | None:
    return load_yaml(folder / RECIPE) if (folder / RECIPE).is_file() else None


def _decoding(answerer: Answerer, settings: Mapping[str, Any]) -> dict[str, Any]:
    told = dict(settings)
    until = list(told.pop("until", ()))
    own = answerer.model.generation_config.to_diff_dict()
    own.pop("transformers_version", None)
    used = own | answerer.decoding(**told) | {"until": until}
    return {key: value for key, value in used.items() if value is not None}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
