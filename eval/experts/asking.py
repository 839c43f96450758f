"""The same questions, put to one checkpoint after another."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedConfig

from eagle_moe.answer import Answerer
from eagle_moe.config import EagleMixConfig
from eagle_moe.explain import Maps
from eagle_moe.scores.identity import Identity, Task
from eval.experts.measure import ALL, Measured, conversation, measure
from eval.identity import identify
from eval.items import Item, hash_items, read_items
from eval.kept import KeptTexts, OnProgress

TASK = "eagle_experts"
VERSION = "1"
"""Of how experts are silenced and scored; raise it when a change moves figures."""
SHOWN_TOKENS = 64
"""Most tokens of a prediction on the page."""


@dataclass(frozen=True)
class Asked:
    """A checkpoint, and what it gave with all of its experts."""

    folder: str
    weights_sha256: str
    measured: Sequence[Measured]


@dataclass(frozen=True)
class Asking:
    """Questions, how they are asked, and the folder that keeps what was measured."""

    items: Sequence[Item]
    data: Path
    out: Path
    batch_size: int
    device: str | None
    dtype: str
    progress: OnProgress | None

    def check(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size}: it must be at least 1.")
        for item in self.items:
            if item.image is None:
                raise ValueError(
                    f'item "{item.id}": it has no image, so no expert can add to its answer. '
                    "Leave it out."
                )

    def load(self, folder: str | Path) -> Answerer:
        return Answerer.load(folder, "keep", SHOWN_TOKENS, self.device, self.dtype)

    def ask(self, folder: str | Path) -> Asked:
        """Load a checkpoint and measure it with all of its experts; progress names it."""

        def named(done: int, total: int, note: str) -> None:
            if self.progress is not None:
                self.progress(done, total, f"{note}, {folder}")

        answerer, asking = self.load(folder), replace(self, progress=named)
        identity = self.identity(folder, answerer)
        measured = asking.measure(answerer, identity, {ALL: ()}, {})
        return Asked(str(folder), identity.weights_sha256, measured)

    def identity(
        self, folder: str | Path, answerer: Answerer, reference: Sequence[Path] = ()
    ) -> Identity:
        task = Task(
            name=TASK,
            version=VERSION,
            config_sha256=_hash_files(reference),
            dataset=None,
            split="test" if self.data.is_dir() else self.data.stem,
            seed=None,
            data_sha256=hash_items(self.items),
            images="keep",
        )
        first = conversation(self.items[0])
        return identify(folder, answerer, task, first, {}, self.batch_size)

    def measure(
        self,
        answerer: Answerer,
        identity: Identity,
        silenced: Mapping[str, Collection[str]],
        means: Maps,
    ) -> list[Measured]:
        kept = KeptTexts(self.out / "kept" / f"{identity.sha256[:16]}.jsonl")
        return measure(answerer, self.items, silenced, means, kept, self.batch_size, self.progress)


def reference_images(data: str | Path, count: int) -> list[Path]:
    """The images, each once, of `count` questions taken from the skills in turn."""
    if count < 1:
        raise ValueError(f"reference = {count}: the mean needs the image of a question or more.")
    return list(dict.fromkeys(i.image for i in read_items(data, count) if i.image is not None))


def expert_names(folder: str | Path) -> list[str]:
    """Experts of a checkpoint in mixture order; reads none of its weights.

    Raises `FileNotFoundError` for a folder without a config and `ValueError` for a model that is
    not ours.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json in it. Give a checkpoint folder.")
    kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if kind != EagleMixConfig.model_type:
        raise ValueError(
            f"{folder}: model_type is {kind}: it has no vision experts. Give a checkpoint of "
            f"model_type {EagleMixConfig.model_type}."
        )
    config = EagleMixConfig.from_pretrained(folder)
    return [spec.name for spec in config.vision_config.expert_specs]


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
