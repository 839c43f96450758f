"""What the data path, packing and the loss head save, side by side in one run.

    python -m train.bench [--rounds N] [--only NAME ...] [--out FILE.json]

CPU time of this process, alternated rounds, median and range of the ratios. They say how much work
is gone, not how fast a GPU is. Results are kept in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eagle_moe.canvas import load_image, to_canvas
from eagle_moe.loss import LanguageModelHead, label_loss
from eval.speed.rounds import compare
from train.data.packing import Plan, fewest_rows, plan_rows
from train.data.sampler import EpochSampler, Work, balance
from train.data.source import RecordSource
from train.logit_memory import peak_logit_bytes

IMAGE_TOKENS = 1024
IMAGE_COST = 1150
"""An image through five experts costs as much as so many tokens through Vicuna-7B (15.1 against
15.3 TFLOP for 1,152; counted on full-size modules)."""

SCALE = 8

Row = tuple[str, str, str]
"""What was measured, the figure, what it should be."""


def realistic_lengths(
    count: int, seed: int = 0, text_only: float = 0.15
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and images per sample of an instruction mixture: one image or none, lognormal text.

    Text has a median of 180 tokens (sigma 0.8), as in performance studies of LLaVA-style data.
    """
    rng = np.random.default_rng(seed)
    images = (rng.random(count) < 1 - text_only).astype(np.int64)
    text = np.clip(rng.lognormal(np.log(180), 0.8, count), 8, 1500).astype(np.int64)
    return text + IMAGE_TOKENS * images, images


# Packing


def packing(rounds: int) -> Iterator[Row]:
    """Packed rows against padded batches: share of useful tokens, balance, speed."""
    tokens, images = realistic_lengths(65_536)
    for length in (4096, 4608, 5120, 6144, 8192):
        start = time.process_time()
        plan = plan_rows(tokens, images, length)
        took = (time.process_time() - start) * 1e6 / len(tokens)
        yield f"useful tokens, packed at {length}", _useful(tokens, plan, length), ">= 0.95"
        if length not in (4096, 8192):
            continue
        yield "  time to plan a million samples", f"{took:.1f} s", ""
        work = Work(plan.totals(tokens), plan.totals(images))
        for ranks in (8, 64):
            order = EpochSampler(len(plan), 0, ranks, work).order()
            slowest = balance(work, order, ranks, 1, IMAGE_COST)
            yield f"  slowest/mean of {ranks} ranks", f"{slowest:.3f}", "<= 1.05"
    fifth, with_images = realistic_lengths(65_536, text_only=0.2)
    plan = plan_rows(fifth, with_images, 4096)
    yield "useful tokens, packed at 4096, 20 % text-only", _useful(fifth, plan, 4096), ""
    together = 4 * (len(tokens) // 4)
    padded = tokens[:together].reshape(-1, 4)
    share = padded.sum() / (4 * padded.max(1)).sum()
    yield "useful tokens, padded batches of 4", f"{share:.3f}", ""
    yield from _packed_speed(rounds)


def _useful(tokens: NDArray[np.int64], plan: Plan, length: int) -> str:
    whole = tokens.sum() / length
    most = whole / fewest_rows(tokens, length)
    return f"{whole / len(plan):.3f} (at most {most:.3f})"


def _packed_speed(rounds: int) -> Iterator[Row]:
    """Training steps of a small Llama over the same samples, padded and packed.

    Lengths and width are an eighth of a 7B model's at 4096, so that attention has the same share of
    the work as there.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=4096 // SCALE,
            intermediate_size=11008 // SCALE,
            num_hidden_layers=2,
            num_attention_heads=8,
            max_position_embeddings=4096 // SCALE,
        )
    )
    tokens, images = realistic_lengths(64, seed=1)
    tokens = np.maximum(tokens // SCALE, 1)
    samples = [torch.randint(3, 512, (int(length),)) for length in tokens]
    plan = plan_rows(tokens, images, 4096 // SCALE)
    rows = [[samples[i] for i in plan.row(row)] for row in range(len(plan))]

    def step(inputs: dict[str, Tensor]) -> None:
        model(**inputs, logits_to_keep=1, use_cache=False).logits.sum().backward()
        model.zero_grad()

    def padded() -> None:
        for start in range(0, len(samples), 4):
            step(_padded(samples[start : start + 4]))

    def packed() -> None:
        for row in rows:
            step(_packed(row))

    _, ours = compare({"padded": padded, "packed": packed}, rounds)
    yield "training steps, packed / padded (attention masked)", str(ours), "> 1"


def _padded(samples: Sequence[Tensor]) -> dict[str, Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(list(samples), batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in samples], batch_first=True),
    }


def _packed(samples: Sequence[Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat(list(samples))[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in samples])[None],
    }


# The loss head


def loss_head(rounds: int) -> Iterator[Row]:
    """Loss over the labelled tenth of the positions against logits at all of them."""
    torch.manual_seed(0)
    positions, width, vocabulary = 1152, 256, 32_000
    head = LanguageModelHead(width, vocabulary, bias=False)
    hidden = torch.randn(1, positions, width, requires_grad=True)
    labels = torch.full((1, positions), -100)
    learned = positions // 10
    labels[:, -learned:] = torch.randint(0, vocabulary, (1, learned))

    def full() -> Tensor:
        logits = head(hidden)[:, :-1].float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    def ours() -> Tensor:
        return label_loss(head, hidden, labels)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: loss().backward()

    _, ratio = compare({"full": step(full), "ours": step(ours)}, rounds)
    yield "loss head, forward and backward, 10 % labels", str(ratio), "> 1"
    most = {
        name: peak_logit_bytes(step(loss), head) for name, loss in (("full", full), ("ours", ours))
    }
    yield "memory of logits at its most", f"{most['full'] / most['ours']:.1f} x less", ">= 10"


# Pictures


def pictures(rounds: int) -> Iterator[Row]:
    """A loader's work on one photograph: file to canvas, against PIL and CLIP's processor
    as the official code has it (transformers 4: no torch in it)."""
    from transformers import CLIPImageProcessorPil

    photo = _photo()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 1024}, crop_size=1024)

    def theirs() -> Any:
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return processor(square, return_tensors="pt")["pixel_values"]

    def ours() -> Tensor:
        return to_canvas(load_image(photo), 1024)

    name = type(processor).__name__
    _, ratio = compare({"theirs": theirs, "ours": ours}, rounds)
    yield f"one 1024 x 768 JPEG, against PIL and {name}", str(ratio), ">= 4"
    theirs_bytes, ours_bytes = (x.numel() * x.element_size() for x in (theirs(), ours()))
    yield "bytes per image to the device", f"{theirs_bytes / ours_bytes:.1f} x less", ">= 4"


def _photo() -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((1024, 768), Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


# Many records


def records(rounds: int) -> Iterator[Row]:
    """Opening 500,000 and 2,000,000 conversations, the first and the next time."""
    with tempfile.TemporaryDirectory() as folder:
        for count in (500_000, 2_000_000):
            path = Path(folder) / f"{count}.jsonl"
            _write_conversations(path, count)
            title = f"{count:,} records ({path.stat().st_size / 1e6:.0f} MB)"
            start = time.perf_counter()
            RecordSource(path)
            yield f"{title}: index made, once", f"{time.perf_counter() - start:.1f} s", ""
            seconds, memory = _in_a_new_process(_open_and_look, str(path))
            yield f"{title}: opened, 1,000 at random", f"{seconds:.2f} s", "< 1 s"
            yield f"{title}: memory of that", f"{memory / 1e6:.0f} MB", "< 100 MB"
        start = time.perf_counter()
        order = iter(EpochSampler(2_000_000, seed=0))
        for _ in range(1_000_000):
            next(order)
        yield (
            "2,000,000 samples: to the middle of an epoch",
            f"{time.perf_counter() - start:.2f} s",
            "at once",
        )


def _write_conversations(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(40, 400, count)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = [
                {"from": "human", "value": "<image>\nWhat is shown here?"},
                {"from": "gpt", "value": "w" * int(sizes[number])},
            ]
            record = {"id": str(number), "image": f"{number}.jpg", "conversations": turns}
            file.write(json.dumps(record) + "\n")


def _open_and_look(path: str) -> tuple[float, float]:
    """Seconds, and bytes of memory of its own that it took."""
    before = _own_memory()
    start = time.perf_counter()
    source = RecordSource(path)
    for index in np.random.default_rng(0).integers(0, len(source), 1000):
        source[int(index)]
    return time.perf_counter() - start, _own_memory() - before


def _own_memory() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return float(line.split()[1]) * 1024


def _in_a_new_process(function: Callable[[str], Any], argument: str) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (argument,))


BENCHES: dict[str, Callable[[int], Iterator[Row]]] = {
    "packing": packing,
    "loss": loss_head,
    "pictures": pictures,
    "records": records,
}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m train.bench`."""
    parser = argparse.ArgumentParser(prog="python -m train.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternated rounds; default: 5")
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES))
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON, too")
    told = parser.parse_args(arguments)
    console = Console()
    found: list[Row] = []
    with _one_thread():
        for name in told.only:
            table = Table(name, "figure", "goal", box=box.SIMPLE)
            for row in BENCHES[name](told.rounds):
                table.add_row(*row)
                found.append(row)
            console.print(table)
    if told.out:
        keys = ("what", "figure", "goal")
        told.out.write_text(
            json.dumps([dict(zip(keys, row, strict=True)) for row in found], indent=1)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
