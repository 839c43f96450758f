"""What produced a score: everything that can change it, in one object kept beside it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from eagle_moe.schema import Schema


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
