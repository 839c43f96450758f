"""Evaluate a checkpoint: `python -m eval.run --model DIR --tasks skills --data SUITE --out DIR`.

Writes `OUT/<task>/items.jsonl.gz` (every question with its answer) and `OUT/<task>/card.json` (the
scores with intervals, and their identity). The work is done by lmms-eval in a process of its own,
or in several (`--processes`); what that prints is in `OUT/harness.log`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from eagle_moe.answer import Images
from eagle_moe.scores.card import CARD, SKILLS, Card, Score
from eval.child import follow
from eval.harness import RunFailed, Settings, run_tasks
from eval.items import read_items
from eval.kept import OnProgress
from eval.tasks.catalogue import expand, installed

LOG = "harness.log"
ERRORS = {"FileNotFoundError": FileNotFoundError, "RunFailed": RunFailed}


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
    settings = {
        "model": str(model),
        "tasks": [SKILLS],
        "data": str(data),
        "out": str(out),
        "images": images,
        "limit": limit,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "device": device,
        "dtype": dtype,
    }
    (card,) = run(Settings.parse(settings, "evaluate"), progress=progress).values()
    return card.dump()


def run(
    settings: Settings,
    processes: int = 1,
    progress: OnProgress | None = None,
    heartbeat: Callable[[], None] | None = None,
) -> dict[str, Card]:
    """Run the tasks in a process of their own, or in several by torchrun; task -> card.

    `heartbeat` is called every second while that lasts; what it raises ends the harness, and the
    answers so far are kept.

    Raises `FileNotFoundError`, `ValueError` or `RunFailed` as the harness did, and `RuntimeError`
    with the end of its log if it died.
    """
    _check(settings)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, (out / LOG).open("a", encoding="utf-8") as log:
        path = Path(folder, "settings.json")
        path.write_text(json.dumps(settings.dump()), encoding="utf-8")
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command += ["-m"]
        code, error = follow([*command, "eval.harness", str(path)], log, progress, heartbeat)
    if error is not None:
        raise ERRORS.get(error["type"], ValueError)(error["message"])
    if code != 0:
        end = (out / LOG).read_text(encoding="utf-8").splitlines()[-20:]
        raise RuntimeError(f"the harness ended with {code}; {out / LOG} ends:\n" + "\n".join(end))
    return {task: Card.load(out / task) for task in settings.tasks}


def _check(settings: Settings) -> None:
    """What can be seen without starting a process."""
    installed()
    if not (Path(settings.model) / "config.json").is_file():
        raise ValueError(f"{settings.model}: not a checkpoint folder (it has no config.json).")
    check_data(settings.tasks, settings.data, settings.limit)


def check_data(tasks: Sequence[str], data: str | None, limit: int | None) -> None:
    """Raise `ValueError` or `FileNotFoundError` if `data` is not what these tasks can be read from.

    Of lmms-eval's own data sets only the folder around them is looked for.
    """
    if SKILLS in tasks:
        if data is None:
            raise ValueError("data: say where the suite is (python -m eval.skills makes it).")
        read_items(data, limit)
    elif data is not None and not Path(data).is_dir():
        raise FileNotFoundError(f"{data}: no such folder. Give that of the data sets.")


def print_card(card: Card, console: Console | None = None) -> None:
    """Every metric, in total and per part, as a table in the terminal."""
    console = console or Console()
    task = card.identity.task
    asked = f"{card.questions_per_second:g} questions/s"
    if card.images_seen:
        asked += f"; {card.images_encoded} images encoded for {card.images_seen} shown"
    console.print(f"{card.model}, {card.task}, images: {task.images} ({asked})", soft_wrap=True)
    table = Table("metric")
    for heading in ("score", "95 % interval", "questions"):
        table.add_column(heading, justify="right")
    for metric, parts in card.metrics.items():
        for part, score in parts.items():
            name = f"{metric}, {part}" if len(parts) > 1 else metric
            table.add_row(name, *_shown(score))
    for metric, why in card.not_run.items():
        table.add_row(metric, "not run", why, "")
    console.print(table)
    for note in card.notes:
        console.print(note, soft_wrap=True)


def _shown(score: Score) -> tuple[str, str, str]:
    if score.low is None or score.high is None:
        return f"{score.value:.4g}", "", str(score.n)
    if score.low >= 0 and score.high <= 1:
        interval = f"{score.low:.1%} to {score.high:.1%}"
        return f"{score.value:.1%}", interval, str(score.n)
    return f"{score.value:.1f}", f"{score.low:.1f} to {score.high:.1f}", str(score.n)


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
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    processes = options.pop("processes")
    try:
        options["tasks"] = expand(options["tasks"].split(","))
        settings = Settings.parse(options, "arguments")
        cards = _cards(settings, processes)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    except RuntimeError as error:
        parser.exit(1, f"{error}\n")
    for card in cards.values():
        print_card(card)


def _cards(settings: Settings, processes: int) -> dict[str, Card]:
    """Under torchrun this process is one of several already; else it starts what does the work."""
    if "RANK" in os.environ:
        _check(settings)
        return run_tasks(settings)
    with progress_bar(Path(settings.model).name) as report:
        return run(settings, processes, report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint.")
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder")
    add("--tasks", default="skills", help="skills, paper, or names of lmms-eval's tasks")
    add("--data", help="the suite's folder or its test.jsonl; folder of local copies; then offline")
    add("--out", required=True, help=f"folder for the scores, OUT/<task>/{CARD}")
    add("--images", choices=["keep", "drop"], default="keep")
    add("--limit", type=int, help="ask only that many questions of each task")
    add("--batch-size", type=int, default=16)
    add("--max-new-tokens", type=int, help="cap of an answer (default: 16 for skills, else 1024)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="auto: that of the weights")
    add("--processes", type=int, default=1, help="that share the questions, such as one per GPU")
    return parser


if __name__ == "__main__":
    main()
