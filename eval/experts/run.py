"""A checkpoint and a suite -> measurements, matrix, page and picture, in one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from eagle_moe.explain import reference_means
from eval.experts.asking import Asked, Asking, expert_names, reference_images
from eval.experts.hints import find_hints
from eval.experts.matrix import Matrix, make_matrix
from eval.experts.measure import variants, write_measured
from eval.experts.page import write_page
from eval.experts.retrained import Others
from eval.items import read_items
from eval.kept import OnProgress

REFERENCE = 256
"""Questions whose images make the mean maps, unless another number is given."""
IMAGES = 10
"""Questions that the page shows, unless another number is given."""


def explain_experts(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    limit: int | None = None,
    reference: int = REFERENCE,
    images: int = IMAGES,
    retrained: Mapping[str, Sequence[str | Path]] | None = None,
    again: Sequence[str | Path] = (),
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
    - `retrained`: expert -> checkpoints that were trained again without it, one per seed.
    - `again`: checkpoints that were trained again with every expert, to stand beside the second of
      `retrained`, the third and so on; the model stands beside the first.

    Raises `FileNotFoundError` or `ValueError` for a folder that is no checkpoint or no suite, a
    model without several experts, and items without an image.
    """
    asking = Asking(
        read_items(data, limit), Path(data), Path(out), batch_size, device, dtype, progress
    )
    asking.check()
    experts = _several_experts(model)
    others = Others(retrained or {}, again)
    others.check(model, experts)
    answerer = asking.load(model)
    paths = reference_images(data, reference)
    means = reference_means(
        answerer.model, answerer.processor.image_processor, paths, batch_size, progress
    )
    identity = asking.identity(model, answerer, paths)
    measured = asking.measure(answerer, identity, variants(experts), means)
    shown = read_items(data, min(images, len(measured))) if images else []
    hints = find_hints(answerer, shown, {one.id: one for one in measured}, means, progress)
    del answerer, means  # there may not be room for two models
    beside = others.measure(asking, Asked(str(model), identity.weights_sha256, measured))
    matrix = make_matrix(measured, experts, str(model), len(paths), identity, beside)
    write_measured(asking.out, measured)
    matrix.save(asking.out)
    write_page(matrix, hints, asking.out)
    return matrix


def _several_experts(folder: str | Path) -> list[str]:
    experts = expert_names(folder)
    if len(experts) < 2:
        raise ValueError(
            f"{folder}: its one expert is {experts[0]}. What an expert adds to others, or brings "
            "without them, needs a mixture of two or more."
        )
    return experts
