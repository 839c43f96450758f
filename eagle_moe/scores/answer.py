"""Answers as they are kept: item by item, with their scores."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ITEMS = "items.jsonl.gz"


@dataclass(frozen=True)
class Answer:
    """What a model answered to one item of a task: a line of `items.jsonl.gz`.

    - `id`: the data set's own, or the number of its row; unique in the file.
    - `part`: the skill or category that is also scored apart; empty where a task has none.
    - `target`: what counts as right, as the task has it: a text, or a list of them.
    - `scores`: metric -> what this item adds to it, for metrics that are means of items' scores.
    - `fields`: short texts and numbers of the data set's row; of the built-in suite, `kind`.
    """

    id: str
    part: str
    question: str
    target: Any
    prediction: str
    scores: dict[str, float]
    fields: dict[str, Any]


def write_answers(folder: str | Path, answers: Sequence[Answer]) -> None:
    """Write `folder/items.jsonl.gz`; the same answers always give the same bytes."""
    path = Path(folder) / ITEMS
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in answers)
    beside.write_bytes(gzip.compress(lines.encode(), mtime=0))
    os.replace(beside, path)


def read_answers(folder: str | Path) -> list[Answer]:
    """Read `folder/items.jsonl.gz`. Raises `ValueError` naming the line that is no answer."""
    path = Path(folder) / ITEMS
    data = path.read_bytes()
    try:
        # not splitlines: an answer may hold what Unicode calls a line separator
        lines = gzip.decompress(data).decode().split("\n")[:-1]
    except (EOFError, OSError) as error:
        raise ValueError(f"{path}: not a complete file: {error}. Evaluate again.") from None
    answers = []
    for number, line in enumerate(lines, start=1):
        try:
            answers.append(Answer(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not an answer: {error}") from None
    return answers
