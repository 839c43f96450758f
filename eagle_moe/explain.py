"""What each expert adds to an answer: experts are silenced, and their maps are weighed.

A silenced expert's map is replaced, before fusion, by the mean of its maps over a reference set of
images: what the rest of the model is used to, but nothing of the image that is asked about. So
every fusion is treated alike. Where a fusion is linear in a map and keeps its channels apart
(`channel_concat` without a norm), this is the same as replacing the expert's channels in the fused
tokens by their mean over the reference set.

    means = reference_means(model, processor.image_processor, reference)
    asked = prepare(processor, questions, answers)
    maps = encode(model, asked.canvases)
    with_all = score(model, asked, maps).log_prob
    without = score(model, asked, silence(maps, means, {"sam"})).log_prob
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eagle_moe.canvas import ImageSource, load_image

Maps = Mapping[str, Tensor]
"""Expert -> feature maps (n,C,h,w), in mixture order."""


@dataclass(frozen=True)
class Asked:
    """Questions with their right answers, as the model takes them: (B,L), padded on the right.

    - `answer_mask`: true at the tokens of the answer, its end included.
    - `canvases`: (n,3,S,S) uint8 of all images in prompt order; empty without one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    canvases: Tensor


@dataclass(frozen=True)
class AnswerScore:
    """How a model takes each of B right answers.

    - `log_prob`: (B,) fp32, natural logarithm of the answer's probability, its end included.
    - `exact`: (B,) bool, whether every token of it is the most likely one given those before it:
      whether greedy decoding writes this answer, token by token.
    """

    log_prob: Tensor
    exact: Tensor


def prepare(
    processor: Any, questions: Sequence[Sequence[dict[str, Any]]], answers: Sequence[str]
) -> Asked:
    """Conversations that end in a question, each with the answer that the assistant gives to it.

    Which tokens are the answer is said by the chat template as the whole is rendered, as in
    training. Raises `ValueError` if it does not say so.
    """
    said = [
        [*question, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        for question, answer in zip(questions, answers, strict=True)
    ]
    inputs = processor.apply_chat_template(
        said,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    mask = torch.as_tensor(inputs["assistant_masks"]).bool()
    if not mask.any(1).all():
        raise ValueError(
            "chat template: it does not mark what the assistant says. Put that between "
            "{% generation %} and {% endgeneration %}."
        )
    _keep_last(mask)
    ids = inputs["input_ids"]
    canvases = inputs.get("pixel_values", torch.empty(0, 3, 0, 0, dtype=torch.uint8))
    return Asked(ids, inputs["attention_mask"], mask, canvases)


def _keep_last(mask: Tensor) -> None:
    """Of several spans in a row of `mask` (B,L), keep the last: earlier turns are context."""
    for row in mask:
        outside = (~row).nonzero().squeeze(1)
        end = int(row.nonzero()[-1])
        before = outside[outside < end]
        row[: int(before[-1]) + 1 if len(before) else 0] = False


@torch.no_grad()
def encode(model: Any, canvases: Tensor) -> dict[str, Tensor]:
    """Canvases (n,3,S,S) uint8 -> feature maps (n,C,h,w) by expert."""
    return model.model.vision_tower.encode(canvases.to(model.device))


def mean_maps(batches: Iterable[Maps]) -> dict[str, Tensor]:
    """The mean map (C,h,w) of each expert over all images of `batches`, in fp32.

    Sums are kept in fp64, so that the mean does not depend on how images were put into batches.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for maps in batches:
        for name, x in maps.items():
            added = x.detach().double().sum(0)
            sums[name] = sums[name] + added if name in sums else added
        count += len(next(iter(maps.values())))
    if not count:
        raise ValueError("reference: the mean over no images is asked for. Give at least one.")
    return {name: (total / count).float() for name, total in sums.items()}


def reference_means(
    model: Any,
    image_processor: Any,
    images: Sequence[ImageSource],
    batch_size: int = 8,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Tensor]:
    """The mean map (C,h,w) of each expert over `images`; `progress(done, of, what)` hears of it."""

    def maps() -> Iterator[Maps]:
        for start in range(0, len(images), batch_size):
            part = [load_image(image) for image in images[start : start + batch_size]]
            canvases = image_processor(part, return_tensors="pt")["pixel_values"]
            yield encode(model, canvases)
            if progress is not None:
                progress(start + len(part), len(images), "reference images")

    return mean_maps(maps())


def silence(maps: Maps, means: Maps, silent: Collection[str]) -> dict[str, Tensor]:
    """`maps` with those of the experts `silent` replaced by their `means` (C,h,w)."""
    assert set(silent) <= set(maps)
    return {
        name: means[name].to(x).expand_as(x) if name in silent else x for name, x in maps.items()
    }


def score(model: Any, asked: Asked, maps: Maps) -> AnswerScore:
    """One forward pass over the right answers, the images seen as `maps`.

    The image placeholder counts as impossible, as it does for `generate`.
    """
    targets = asked.input_ids[:, 1:].to(model.device)
    counted = asked.answer_mask[:, 1:].to(model.device)
    columns = counted.any(0).nonzero().squeeze(1)
    targets, counted = targets[:, columns], counted[:, columns]
    image = model.get_image_features(maps, return_dict=True)
    logits = model(
        input_ids=asked.input_ids.to(model.device),
        attention_mask=asked.attention_mask.to(model.device),
        mm_encoder_outputs={"image": image},
        logits_to_keep=columns,
        use_cache=False,
    ).logits.float()
    placeholder = torch.tensor([model.config.image_token_id], device=logits.device)
    logits = logits.index_fill(-1, placeholder, float("-inf"))
    chosen = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    log_prob = chosen.masked_fill(~counted, 0.0).sum(1)
    exact = ((logits.argmax(-1) == targets) | ~counted).all(1)
    return AnswerScore(log_prob, exact)


def weigh(model: Any, asked: Asked, maps: Maps, means: Maps) -> dict[str, Tensor]:
    """Where each expert's features mattered to the right answer: (n,h,w) fp32 on its own grid.

    Gradient x input: the gradient of the answer's log-probability with respect to a map, times
    the map as it differs from `means`, summed over channels. The sum over a grid is what silencing
    this expert would take from the log-probability, were the model linear; it is not, so these
    maps are hints.

    Input is counted from the mean and not from zero, because a LayerNorm before fusion undoes the
    scale of a cell's features: from zero, every cell of a map on the fusion's grid would weigh
    nothing. Items of a batch must not share images.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in maps.items()}
    log_prob = score(model, asked, leaves).log_prob
    gradients = torch.autograd.grad(log_prob.sum(), list(leaves.values()))
    return {
        name: ((x.detach().float() - means[name].to(x.device)) * gradient.float()).sum(1)
        for (name, x), gradient in zip(leaves.items(), gradients, strict=True)
    }
