"""`python -m eval.experts --model DIR --data SUITE --out DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eagle_moe.scores.card import Score
from eval.experts.differences import holds_zero
from eval.experts.matrix import Matrix
from eval.experts.page import PAGE
from eval.experts.run import IMAGES, REFERENCE, explain_experts
from eval.experts.words import UNITS, show
from eval.run import progress_bar


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and say where the page is. Mistakes of the person end in one line, code 2."""
    parser = _parser()
    told = vars(parser.parse_args(arguments))
    try:
        told["retrained"] = _by_expert(told["retrained"])
        with progress_bar(Path(told["model"]).name) as progress:
            matrix = explain_experts(**told, progress=progress)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print_matrix(matrix)
    print(f"The page: {Path(told['out']) / PAGE}")


def print_matrix(matrix: Matrix, console: Console | None = None) -> None:
    """What the model loses without each expert, in the terminal; dim where that may be nothing."""
    console = console or Console()
    for metric, title in UNITS.items():
        table = Table(
            title=f"lost without an expert: {title}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("", no_wrap=True)
        for part in matrix.parts:
            table.add_column(part, justify="right")
        for expert, parts in matrix.leave_one_out[metric].items():
            table.add_row(expert, *(_cell(metric, parts[part]) for part in matrix.parts))
        console.print(table)


def _cell(metric: str, score: Score) -> Text:
    return Text(show(metric, score)[0], style="dim" if holds_zero(score) else "bold")


def _by_expert(texts: Sequence[str]) -> dict[str, list[str]]:
    """`EXPERT=DIR`, several of one expert in the order given."""
    found: dict[str, list[str]] = {}
    for text in texts:
        expert, _, folder = text.partition("=")
        if not folder:
            raise ValueError(f"--retrained {text}: give EXPERT=DIR, such as sam=runs/no-sam/sft.")
        found.setdefault(expert, []).append(folder)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.experts", description="What each expert of a model adds."
    )
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--data", required=True, help="suite folder, or its test.jsonl")
    parser.add_argument("--out", required=True, help="folder for matrix, items, page and picture")
    parser.add_argument("--limit", type=int, help="ask only that many questions")
    parser.add_argument(
        "--reference",
        type=int,
        default=REFERENCE,
        help="questions whose images make the mean that replaces an expert's map",
    )
    parser.add_argument("--images", type=int, default=IMAGES, help="questions to show on the page")
    parser.add_argument(
        "--retrained",
        action="append",
        default=[],
        metavar="EXPERT=DIR",
        help="a checkpoint trained again without that expert (python -m train.again), to compare; "
        "several times for several seeds",
    )
    parser.add_argument(
        "--again",
        action="append",
        default=[],
        metavar="DIR",
        help="the model trained again with another seed, to stand beside the second --retrained of "
        "an expert, then the third",
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="auto: that of the weights")
    return parser


if __name__ == "__main__":
    main()
