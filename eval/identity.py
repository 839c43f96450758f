"""What produced a score: everything that can change it, in one object kept beside it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from eagle_moe.answer import Answerer, Conversation
from eagle_moe.schema import Schema, load_yaml

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


class Task(Schema):
    """What was asked.

    - `name`, `version`, `config_sha256`: of the harness's task. `config_sha256` is of everything
      that its YAML says: prompt, generation, scorers and their code.
    - `dataset`, `split`: where its questions are from; `version` and `seed` of the built-in suite
      are those that the suite says.
    - `data_sha256`: of every question that was asked, with its images.
    - `images`: `drop` if the model was asked without them.
    """

    name: str
    version: str | None
    config_sha256: str
    dataset: str | None
    split: str
    seed: int | None
    data_sha256: str
    images: Literal["keep", "drop"]


class Identity(Schema):
    """Two scores with equal identities were produced in the same way from the same things.

    - `weights_sha256`: of the one safetensors file (what `sha256sum` prints), or, for several, of
      the lines that `sha256sum *.safetensors` prints.
    - `recipe`: the resolved training recipe, if the checkpoint carries one.
    - `prompt`: the first item's, as rendered; `template_sha256` is of the chat template.
    - `decoding`: what `generate` was told, with what the checkpoint's own generation config adds,
      and `until`, the texts before which an answer was cut.
    - `batch_size` of each of the `processes` that shared the questions.
    - `device`: `cpu`, or the name of the GPU.
    """

    weights_sha256: str
    model_type: str
    recipe: dict[str, Any] | None
    task: Task
    template_sha256: str
    prompt: str
    decoding: dict[str, Any]
    batch_size: int
    processes: int = 1
    dtype: str
    device: str
    versions: dict[str, str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.dump(), sort_keys=True).encode()).hexdigest()


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


def hash_weights(folder: str | Path) -> str:
    """sha256 of a checkpoint's weights; see `Identity`. Raises `ValueError` if there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no .safetensors file in it. Give a checkpoint folder.")
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    lines = (f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
