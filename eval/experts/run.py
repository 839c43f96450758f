"""A checkpoint and a suite -> measurements, matrix, page and picture, in one folder."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from eagle_moe.answer import Answerer
from eagle_moe.config import EagleMixConfig
from eagle_moe.explain import Maps, reference_means
from eagle_moe.schema import nearest
from eagle_moe.scores.identity import Identity, Task, hash_weights
from eval.experts.hints import find_hints
from eval.experts.matrix import Matrix, Retrained, compare, make_matrix
from eval.experts.measure import (
    ALL,
    Measured,
    conversation,
    measure,
    variants,
    write_measured,
)
from eval.experts.page import write_page
from eval.identity import identify
from eval.items import Item, hash_items, read_items
from eval.kept import KeptTexts, OnProgress

TASK = "eagle_experts"
VERSION = "1"
"""Of how experts are silenced and scored; raise it when a change moves figures."""
REFERENCE = 256
"""Questions whose images make the mean maps, unless another number is given."""
IMAGES = 10
"""Questions that the page shows, unless another number is given."""
SHOWN_TOKENS = 64
"""Most tokens of a prediction on the page."""


def explain_experts(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    limit: int | None = None,
    reference: int = REFERENCE,
    images: int = IMAGES,
    retrained: Mapping[str, str | Path] | None = None,
    batch_size: int = 16,
    device: str | None = None,
    dtype: str = "auto",
    progress: OnProgress | None = None,
) -> Matrix:
    """What each expert of checkpoint folder `model` adds to its answers to suite `data`.

    Leaves `experts.json` (the matrix), `items.jsonl.gz` (every item under every variant),
    `experts.html` and `experts.png` in `out`. What was measured is kept in `out/kept` as it comes
    and not measured again: a run that was stopped goes on.

    - `limit`, `reference`, `images`: ask, take the mean over the images of, and show only so many
      questions, taken from the skills in turn.
    - `retrained`: expert -> checkpoint that was trained again without it.

    Raises `FileNotFoundError` or `ValueError` for a folder that is no checkpoint or no suite, a
    model without several experts, and items without an image.
    """
    asking = _Asking(read_items(data, limit), Path(data), Path(out), batch_size, progress)
    asking.check()
    answerer = _load(model, device, dtype)
    experts = _several_experts(answerer, model)
    asked_again = {
        name: (folder, _load_retrained(name, folder, experts, device, dtype))
        for name, folder in (retrained or {}).items()
    }
    paths = reference_images(data, reference)
    means = reference_means(
        answerer.model, answerer.processor.image_processor, paths, batch_size, progress
    )
    identity = asking.identity(model, answerer, paths)
    measured = asking.measure(answerer, identity, variants(experts), means)
    again = {}
    for name, (folder, other) in asked_again.items():
        found = asking.measure(other, asking.identity(folder, other), {ALL: ()}, {})
        again[name] = Retrained(
            model=str(folder), weights_sha256=hash_weights(folder), lost=compare(measured, found)
        )
    matrix = make_matrix(measured, experts, str(model), len(paths), identity, again)
    shown = read_items(data, min(images, len(measured))) if images else []
    hints = find_hints(answerer, shown, {one.id: one for one in measured}, means, progress)
    write_measured(asking.out, measured)
    matrix.save(asking.out)
    write_page(matrix, hints, asking.out)
    return matrix


@dataclass(frozen=True)
class _Asking:
    """The same questions for every model."""

    items: Sequence[Item]
    data: Path
    out: Path
    batch_size: int
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


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _load(folder: str | Path, device: str | None, dtype: str) -> Answerer:
    """Raises `ValueError` for a model that is not ours before any of its weights is read."""
    if (Path(folder) / "config.json").is_file():
        kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
        if kind != EagleMixConfig.model_type:
            raise ValueError(
                f"{folder}: model_type is {kind}: it has no vision experts. Give a checkpoint of "
                f"model_type {EagleMixConfig.model_type}."
            )
    return Answerer.load(folder, "keep", SHOWN_TOKENS, device, dtype)


def _names(answerer: Answerer) -> list[str]:
    """Experts in mixture order."""
    return [spec.name for spec in answerer.model.config.vision_config.expert_specs]


def _several_experts(answerer: Answerer, folder: str | Path) -> list[str]:
    experts = _names(answerer)
    if len(experts) < 2:
        raise ValueError(
            f"{folder}: its one expert is {experts[0]}. What an expert adds to others, or brings "
            "without them, needs a mixture of two or more."
        )
    return experts


def _load_retrained(
    name: str, folder: str | Path, experts: Sequence[str], device: str | None, dtype: str
) -> Answerer:
    if name not in experts:
        raise ValueError(f'retrained: the model has no expert "{name}".{nearest(name, experts)}')
    answerer = _load(folder, device, dtype)
    others = [one for one in experts if one != name]
    if _names(answerer) != others:
        raise ValueError(
            f"retrained: {folder} has the experts {', '.join(_names(answerer))}, but the model "
            f"without {name} has {', '.join(others)}."
        )
    return answerer
