from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eagle_moe.loss
from eagle_moe.loss import IGNORE_INDEX, LanguageModelHead, label_loss
from eagle_moe.model import EagleMixForConditionalGeneration
from tests.conftest import make_config, make_model
from train.logit_memory import peak_logit_bytes

WIDTH, VOCABULARY = 16, 101


def make_rows(share: float = 0.3, length: int = 40) -> tuple[Tensor, Tensor]:
    """Hidden states (3,L,D) and labels (3,L), of which `share` count."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, length, WIDTH, generator=generator)
    labels = torch.randint(0, VOCABULARY, (3, length), generator=generator)
    order = torch.rand(3, length, generator=generator).argsort(1)
    return hidden, torch.where(order < round(share * length), labels, IGNORE_INDEX)


def make_head() -> LanguageModelHead:
    torch.manual_seed(0)
    return LanguageModelHead(WIDTH, VOCABULARY, bias=False)


def full_loss(head: nn.Module, hidden: Tensor, labels: Tensor, count: Any = None) -> Tensor:
    """By all logits at once, as textbooks have it."""
    logits = head(hidden)[:, :-1].flatten(0, 1).float()
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / ((labels[:, 1:] != IGNORE_INDEX).sum() if count is None else count)


def with_gradients(
    loss: Callable[..., Tensor], head: nn.Module, hidden: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The loss, and its gradients for the hidden states and the head's weight."""
    hidden = hidden.clone().requires_grad_()
    weight = next(head.parameters())
    value = loss(head, hidden, *rest)
    return value.detach(), *torch.autograd.grad(3 * value, [hidden, weight])


@pytest.fixture(params=["at once", "in chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Few rows need no chunks; here they get some of seven rows, and a last one that is shorter."""
    if request.param == "in chunks":
        monkeypatch.setattr(eagle_moe.loss, "CHUNK_LOGITS", 7 * VOCABULARY + 5)
    return request.param


@pytest.mark.parametrize("count", [None, 50, torch.tensor(50)])
def test_loss_and_gradients_are_those_of_full_logits(chunks: str, count: Any) -> None:
    head, (hidden, labels) = make_head(), make_rows()
    ours = with_gradients(label_loss, head, hidden, labels, count)
    theirs = with_gradients(full_loss, head, hidden, labels, count)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_the_comparison_sees_a_loss_that_is_not_shifted() -> None:
    head, (hidden, labels) = make_head(), make_rows()
    unshifted = F.pad(labels[:, :-1], (1, 0), value=IGNORE_INDEX)
    ours = label_loss(head, hidden, unshifted)
    assert (ours - full_loss(head, hidden, labels)).abs() > 1e-3


@pytest.mark.parametrize("frozen", ["head", "rows"])
def test_what_is_frozen_gets_no_gradient(chunks: str, frozen: str) -> None:
    head, (hidden, labels) = make_head(), make_rows()
    head.requires_grad_(frozen == "rows")
    hidden.requires_grad_(frozen == "head")
    label_loss(head, hidden, labels).backward()
    assert (head.weight.grad is None) == (frozen == "head")
    assert (hidden.grad is None) == (frozen == "rows")


def test_bfloat16_weights_have_a_float32_loss(chunks: str) -> None:
    head, (hidden, labels) = make_head().bfloat16(), make_rows()
    loss, rows, weight = with_gradients(label_loss, head, hidden.bfloat16(), labels)
    assert (loss.dtype, rows.dtype, weight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    exact = with_gradients(
        full_loss, copy.deepcopy(head).float(), hidden.bfloat16().float(), labels
    )
    assert float((loss - exact[0]).abs() / exact[0]) < 2e-3
    assert float((weight.float() - exact[2]).norm() / exact[2].norm()) < 2e-2


def test_mixed_precision_is_that_of_full_logits(chunks: str) -> None:
    head, (hidden, labels) = make_head(), make_rows()
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(label_loss, head, hidden, labels)
        theirs = with_gradients(full_loss, head, hidden, labels)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs] == [torch.float32] * 3
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-2


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0), 9])
def test_without_a_label_the_loss_is_zero_with_a_graph(count: Any) -> None:
    head, (hidden, labels) = make_head(), make_rows()
    nothing = torch.full_like(labels, IGNORE_INDEX)
    loss, rows, weight = with_gradients(label_loss, head, hidden, nothing, count)
    assert loss == 0
    assert not rows.any() and not weight.any()
    assert full_loss(head, hidden, nothing).isnan()  # which is what must not happen


def test_micro_batches_with_unequal_labels_add_up_to_one_mean() -> None:
    head, (hidden, labels) = make_head(), make_rows()
    labels[0, 5:] = IGNORE_INDEX
    count = (labels[:, 1:] != IGNORE_INDEX).sum()
    parts = [label_loss(head, hidden[i : i + 1], labels[i : i + 1], count) for i in range(3)]
    whole = full_loss(head, hidden, labels)
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-6, atol=0)
    means = [full_loss(head, hidden[i : i + 1], labels[i : i + 1]) for i in range(3)]
    assert (torch.stack(means).mean() - whole).abs() > 1e-3  # the mistake to avoid


def test_a_head_that_was_replaced_does_as_well() -> None:
    head, (hidden, labels) = make_head(), make_rows()
    plain = nn.Linear(WIDTH, VOCABULARY, bias=False)
    plain.load_state_dict(head.state_dict())
    assert label_loss(plain, hidden, labels) == label_loss(head, hidden, labels)


def test_the_head_is_called_once_whatever_the_number_of_chunks(chunks: str) -> None:
    """Ranks that called it unequally often would wait for each other under ZeRO-3 and FSDP."""
    head, (hidden, labels) = make_head(), make_rows()
    calls: list[int] = []
    head.register_forward_hook(lambda *_: calls.append(1))
    label_loss(head, hidden.requires_grad_(), labels).backward()
    label_loss(head, hidden, torch.full_like(labels, IGNORE_INDEX)).backward()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("chunks", "factor"), [("at once", 10), ("in chunks", 50)], indirect=["chunks"]
)
def test_a_tenth_of_the_labels_takes_a_tenth_of_the_memory(chunks: str, factor: int) -> None:
    head, (hidden, labels) = make_head(), make_rows(share=0.1, length=400)

    def peak(loss: Callable[..., Tensor]) -> int:
        return peak_logit_bytes(lambda: with_gradients(loss, head, hidden, labels), head)

    assert peak(full_loss) >= 2 * 3 * 399 * VOCABULARY * 4  # logits and their gradient
    assert peak(full_loss) >= factor * peak(label_loss)


def saved_logit_bytes(step: Callable[[], Any]) -> int:
    """Bytes of tensors as wide as the vocabulary that wait for the backward pass."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim() and tensor.shape[-1] == VOCABULARY:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = step()
    assert kept.requires_grad
    return sum(sizes.values())


def test_chunks_keep_no_logits_for_the_backward_pass(chunks: str) -> None:
    head, (hidden, labels) = make_head(), make_rows(share=0.1, length=400)
    full = saved_logit_bytes(lambda: full_loss(head, hidden, labels))
    ours = saved_logit_bytes(lambda: label_loss(head, hidden, labels))
    assert full >= 10 * ours
    assert (ours == 0) == (chunks == "in chunks")


@pytest.fixture(scope="module")
def model() -> EagleMixForConditionalGeneration:
    return make_model(make_config(grid=2))


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((2, 4), 3), torch.randint(10, 200, (2, 6), generator=generator)], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
        "labels": torch.where(torch.arange(10) > 6, ids, IGNORE_INDEX),
    }


def test_the_model_skips_logits_when_asked(model: EagleMixForConditionalGeneration) -> None:
    batch = make_batch()
    whole, short = model(**batch), model(**batch, skip_logits=True)
    assert whole.logits.shape == (2, 10, model.config.text_config.vocab_size)
    assert short.logits is None
    torch.testing.assert_close(short.loss, whole.loss, rtol=1e-6, atol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    one = torch.autograd.grad(whole.loss, parameters, allow_unused=True)
    other = torch.autograd.grad(short.loss, parameters, allow_unused=True)
    for left, right in zip(one, other, strict=True):
        if left is not None:
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_no_logits_and_no_labels_is_a_mistake(model: EagleMixForConditionalGeneration) -> None:
    batch = make_batch()
    del batch["labels"]
    with pytest.raises(ValueError, match="skip_logits"):
        model(**batch, skip_logits=True)
