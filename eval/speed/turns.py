"""What a second question about an image costs: its time to the first token, against the first's.

    python -m eval.speed.turns --model runs/demo/model [--rounds N] [--only demo large]

`demo` is the model of `--model`. `large` is a random one of realistic proportions that two cores
can run, with that model's tokenizer: CLIP-B/14 at 448 and ConvNeXt-B at 512 behind 256 tokens per
image, and a Llama of 12 layers of width 768 (LARGE below).

CPU time of this process. In each round a conversation about another image: its first question, its
second question, and the second one with nothing kept; the last two change places every round.
Results are kept in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from eagle_moe.build import ModelSpec, build_config, build_model, build_processor
from eagle_moe.chat.session import ChatSession
from eagle_moe.processor import IMAGE_TOKEN

GOAL = 0.35
"""Of the first question's time, at most."""
QUESTIONS = ("what is the text in the picture", "how many shapes are there")
LARGE: dict[str, Any] = {
    "canvas": {"size": 448},
    "experts": [
        {
            "name": "clip",
            "preset": "clip",
            "view": {"size": 448},
            "arch": {"hidden_size": 768, "mlp_size": 3072, "layers": 12, "heads": 12},
        },
        {
            "name": "convnext",
            "preset": "convnext",
            "view": {"size": 512},
            "arch": {"depths": [3, 3, 27, 3], "dims": [128, 256, 512, 1024]},
        },
    ],
    "fusion": {"kind": "channel_concat", "grid": 16},
    "language_model": {
        "config": {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
        }
    },
    "template": "vicuna",
}


def large_session(tokenizer_folder: Path) -> ChatSession:
    """The model of `LARGE` with random weights."""
    text = {**LARGE["language_model"], "tokenizer": str(tokenizer_folder)}
    spec = ModelSpec.parse({**LARGE, "language_model": text}, "LARGE")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = build_config(spec, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    torch.manual_seed(0)
    return ChatSession(build_model(config).eval(), build_processor(spec, tokenizer))


def first_token(session: ChatSession, question: str) -> float:
    """CPU seconds to the first token of an answer."""
    start = time.process_time()
    for _ in session.ask(question, max_new_tokens=1):
        pass
    return time.process_time() - start


def one_round(
    session: ChatSession, image: Image.Image, plain_first: bool
) -> tuple[float, float, float]:
    """CPU seconds of the first question about an image, the second, and that with nothing kept."""
    session.reset()
    session.add_image(image)
    first = first_token(session, QUESTIONS[0])
    without = ChatSession(session.model, session.processor)
    without.turns = list(session.turns)
    if not plain_first:
        second = first_token(session, QUESTIONS[1])
        return first, second, first_token(without, QUESTIONS[1])
    plain = first_token(without, QUESTIONS[1])
    return first, first_token(session, QUESTIONS[1]), plain


def measure(session: ChatSession, rounds: int) -> list[tuple[float, float, float]]:
    """`one_round` for images of noise, each another one, after a round that does not count."""
    draw = np.random.default_rng(0)
    found = []
    for number in range(rounds + 1):
        image = Image.fromarray(draw.integers(0, 256, (300, 400, 3), dtype=np.uint8))
        found.append(one_round(session, image, plain_first=number % 2 == 0))
    return found[1:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m eval.speed.turns`."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed.turns", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--only", nargs="+", choices=["demo", "large"], default=["demo", "large"])
    told = parser.parse_args(arguments)
    if not (told.model / "config.json").is_file():
        parser.error(f"--model {told.model}: no model there. Run `make demo`, or name another.")
    table = Table(
        "model",
        "first question",
        "second",
        "second / first",
        "goal",
        "nothing kept",
        box=box.SIMPLE,
    )
    for name in told.only:
        demo = name == "demo"
        session = ChatSession.load(told.model, "cpu") if demo else large_session(told.model)
        table.add_row(name, *_row(measure(session, told.rounds)))
    Console().print(table)
    return 0


def _row(found: Sequence[tuple[float, float, float]]) -> list[str]:
    first, second, _ = zip(*found, strict=True)
    share = [after / before for before, after, _ in found]
    again = [plain / before for before, _, plain in found]
    return [
        f"{median(first):.3f} s",
        f"{median(second):.3f} s",
        f"{median(share):.2f} ({min(share):.2f}-{max(share):.2f})",
        f"<= {GOAL}",
        f"{median(again):.2f} ({min(again):.2f}-{max(again):.2f})",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
