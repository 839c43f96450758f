"""The loss of a causal language model, from the positions that have a label and no others.

A training batch teaches some tenth of its positions, and a head makes V (32,000 to 128,256) logits
of each: at every position of four samples of 1,152 tokens, Llama-3's are 2.4 GB in fp32, several
times over. Here rows are chosen first; then the head sees them alone, in chunks if they are many.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100
"""Label of a position from which nothing is learned."""

CHUNK_LOGITS = 2**25
"""Logits that exist at a time: 128 MiB in fp32, 1,048 rows of V = 32,000 or 261 of V = 128,256.

Measured, forward and backward, fp32, 1,024 rows, D = 256, on one core; the peak includes the
gradient of the head's weight, 125 MiB for the larger vocabulary:

| logits at a time | V = 128,256: MiB, s | V = 32,000: MiB, s |
|------------------|---------------------|--------------------|
| all              | 1519, 3.6           | 391, 0.8           |
| 2**26            | 647, 4.1            | all                |
| 2**25            | 392, 4.1            | all                |
| 2**24            | 264, 4.2            | 177, 1.0           |
| 2**23            | 201, 4.9            | 106, 1.0           |
| torch's operator | 137, 18.0           | 43, 1.3            |

Below 2**25 little is left to save beside that gradient (1 GB in bfloat16 for Llama-3), and a GPU
reads the whole weight for each chunk: with fewer than about 260 rows that takes longer than the
arithmetic (790 TFLOP/s against 3 TB/s, an H100). torch's operator is
`torch.nn.functional.linear_cross_entropy` with options: it saves more, but took up to five times
as long, gives a bfloat16 loss for bfloat16 rows, and is not in every torch that we support.
"""


class LanguageModelHead(nn.Linear):
    """Hidden states (..., D) -> logits (..., V); with labels, their loss instead.

    The loss is made inside the module's call, so that whoever shards its weight (ZeRO-3, FSDP)
    gathers it once in each direction, however many chunks a rank has.
    """

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits; or, for rows (R,D) and `labels` (R,), the sum of their cross-entropies, ()."""
        if labels is None:
            return super().forward(hidden)
        if len(labels) * self.out_features <= CHUNK_LOGITS:
            return _cross_entropy(super().forward(hidden), labels)
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            rows = max(CHUNK_LOGITS // self.out_features, 1)
            return _Chunked.apply(hidden.to(dtype), self.weight.to(dtype), labels, rows)


def label_loss(
    head: nn.Module, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Next-token loss () fp32 of `hidden` (B,L,D) at the positions whose next `labels` (B,L) count.

    The sum is divided by `num_items_in_batch`, the number of labels in all micro batches of all
    processes, or else by the number of labels here. Without any label the loss is 0, with gradients
    of 0: every rank has the same graph.
    """
    targets = labels[:, 1:].to(hidden.device)
    learned = targets != IGNORE_INDEX
    rows, targets = hidden[:, :-1][learned], targets[learned]
    if isinstance(head, LanguageModelHead):
        total = head(rows, targets)
    else:  # replaced by `resize_token_embeddings`, or wrapped by an adapter
        total = _cross_entropy(head(rows), targets)
    if num_items_in_batch is None:
        return total / max(len(targets), 1)
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


class _Chunked(torch.autograd.Function):
    """Sum of the cross-entropies of rows, whose logits are computed again in the backward pass.

    One gradient of the weight is added to, chunk after chunk, where autograd would make one each.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        norms = []
        for part, targets in zip(hidden.split(rows), labels.split(rows), strict=True):
            logits = F.linear(part, weight).float()
            chosen = logits.gather(1, targets[:, None]).squeeze(1)
            norms.append(logits.logsumexp(1))
            total += (norms[-1] - chosen).sum()
        ctx.save_for_backward(hidden, weight, labels, torch.cat(norms))
        ctx.rows = rows
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, norms = ctx.saved_tensors
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if for_hidden else None
        of_weight = torch.zeros_like(weight) if for_weight else None
        for start in range(0, len(labels), ctx.rows):
            span = slice(start, start + ctx.rows)
            # the gradient of a row's logits: its softmax, less 1 at the label
            slope = F.linear(hidden[span], weight).float().sub_(norms[span, None]).exp_()
            at = labels[span, None]
            slope.scatter_add_(1, at, torch.full_like(at, -1, dtype=slope.dtype))
            slope = slope.mul_(gradients[0]).to(weight.dtype)
            if of_hidden is not None:
                torch.mm(slope, weight, out=of_hidden[span])
            if of_weight is not None:
                of_weight.addmm_(slope.t(), hidden[span])
        return of_hidden, of_weight, None, None
