"""Evaluate a checkpoint on a suite: `python -m eval.run --model DIR --data DIR --out DIR`.

Writes `items.jsonl.gz` (every question with its answer) and `card.json` (accuracy with intervals,
and the identity of the score) into the folder of its task, `OUT/eagle_skills`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from eval.answer import CheckpointAnswerer, Images, OnProgress, answer_items, write_answers
from eval.card import ACCURACY, CARD, SKILLS, Card, count
from eval.identity import Identity, identify
from eval.items import Item, read_items


def evaluate(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    images: Images = "keep",
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    device: str | None = None,
    dtype: str = "auto",
    progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Answer the test questions of suite `data` with checkpoint folder `model`, and score them.

    Returns what `out/eagle_skills/card.json` then holds. A run that was interrupted continues; one
    that is finished is read back. Both only if the identity of the score is the same: answers of
    other weights, data or settings are never mixed in.

    - `images`: `drop` asks without the image (the blind model).
    - `limit`: ask only that many questions, taken from the skills in turn.
    - `progress(done, total, note)`: called after every batch.

    Raises `FileNotFoundError` or `ValueError` for a folder that is no checkpoint or no suite.
    """
    out = Path(out) / SKILLS
    items = read_items(data, limit)
    answerer = CheckpointAnswerer.load(model, images, max_new_tokens, device, dtype)
    answerer.check(items)
    identity = identify(model, answerer, items, data, batch_size)
    card = _finished(out, identity)
    if card is None:
        card = _ask(answerer, items, identity, out, str(model), progress)
    elif progress is not None:
        progress(len(items), len(items), "finished before")
    return card.dump()


def _ask(
    answerer: CheckpointAnswerer,
    items: Sequence[Item],
    identity: Identity,
    out: Path,
    model: str,
    progress: OnProgress | None,
) -> Card:
    """Answer what is not answered yet, and leave answers and card in `out`."""
    part = out / f"answers.{identity.sha256[:12]}.part.jsonl"
    before = part.read_bytes().count(b"\n") if part.exists() else 0
    start = time.perf_counter()
    answers = answer_items(items, answerer, part, identity.batch_size, progress)
    seconds = time.perf_counter() - start
    card = Card(
        model=model,
        primary=ACCURACY,
        metrics=count(answers, [ACCURACY]),
        means=[ACCURACY],
        identity=identity,
        seconds=round(seconds, 3),
        questions_per_second=round((len(answers) - before) / seconds, 2),
    )
    (out / CARD).unlink(missing_ok=True)  # never a card beside answers that are not its own
    write_answers(out, answers)
    card.save(out)
    for stale in out.glob("answers.*.part.jsonl"):
        stale.unlink()
    return card


def _finished(out: Path, identity: Identity) -> Card | None:
    if not (out / CARD).is_file():
        return None
    card = Card.load(out)
    return card if card.identity == identity else None


def print_card(card: Card, console: Console | None = None) -> None:
    """Accuracy in total and per skill, as a table in the terminal."""
    console = console or Console()
    console.print(f"{card.model}, images: {card.identity.task.images}", soft_wrap=True)
    table = Table("skill")
    for heading in ("right", "95 % interval", "questions"):
        table.add_column(heading, justify="right")
    for skill, score in card.accuracy.items():
        interval = f"{score.low:.1%} to {score.high:.1%}"
        table.add_row(skill, f"{score.mean:.1%}", interval, str(score.n))
    console.print(table)


@contextmanager
def progress_bar(label: str) -> Iterator[OnProgress]:
    """A progress bar in the terminal; yields what `evaluate` takes as `progress`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(label, total=None, note="loading")

        def report(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint on a suite.")
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--data", required=True, help="suite folder, or its test.jsonl")
    parser.add_argument("--out", required=True, help="folder for the scores")
    parser.add_argument("--images", choices=["keep", "drop"], default="keep")
    parser.add_argument("--limit", type=int, help="ask only that many questions")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="auto: that of the weights")
    options = vars(parser.parse_args(arguments))
    try:
        with progress_bar(Path(options["model"]).name) as report:
            card = evaluate(**options, progress=report)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    print_card(Card.parse(card, CARD))


if __name__ == "__main__":
    main()
