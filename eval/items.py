"""A suite on disk -> items: one question each, with its image and its right answer.

A line of `DIR/test.jsonl` is a LLaVA-style record with one question, and says once more in plain
fields what is asked and what counts as right:

    {"id": "test-text-000007", "image": "images/test-text-000007.png",
     "skill": "text", "kind": "word", "question": "what is the text", "answer": "lamp",
     "conversations": [{"from": "human", "value": "<image>\\nwhat is the text"},
                       {"from": "gpt", "value": "lamp"}]}

`skill` is what is scored apart; `kind` is the form of question that shares a range of possible
answers (the guesser of `eagle_moe.scores.score.chance_of` needs it). A prompt is the image, if
there is one, then the question.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from eagle_moe.scores.score import normalise

FIELDS = ("id", "skill", "kind", "question", "answer", "conversations")


@dataclass(frozen=True)
class Item:
    """One question about at most one image."""

    id: str
    skill: str
    kind: str
    question: str
    answer: str
    image: Path | None


def read_items(data: str | Path, limit: int | None = None) -> list[Item]:
    """Read `DIR/test.jsonl`, or the file itself if `data` is one.

    `limit` keeps that many items, taken from the skills in turn, so that a part stays a sample of
    the whole. Raises `FileNotFoundError` or `ValueError` naming the file and the line.
    """
    path = _file(data, "test.jsonl")
    items = [_item(record, path.parent, where) for where, record in _records(path)]
    if not items:
        raise ValueError(f"{path}: no questions in it. Build the suite again.")
    _check_unique(items, path)
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise ValueError(f"limit = {limit}: at least one question must be asked.")
    by_skill: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_skill[item.skill].append(item)
    rounds = zip_longest(*by_skill.values())
    return [item for turn in rounds for item in turn if item is not None][:limit]


def training_answers(data: str | Path) -> dict[str, set[str]]:
    """Distinct normalised answers of every `kind` in `DIR/train.jsonl`.

    A training record may hold several turns; its `kinds` names the kind of each answer, in order.
    """
    path = _file(data, "train.jsonl")
    answers: dict[str, set[str]] = defaultdict(set)
    for where, record in _records(path):
        said = _said(record, "gpt", where)
        kinds = record.get("kinds") or ()
        if len(kinds) != len(said):
            raise ValueError(f"{where}: {len(said)} answers but {len(kinds)} `kinds`.")
        for kind, answer in zip(kinds, said, strict=True):
            answers[kind].add(normalise(answer))
    return dict(answers)


def hash_items(items: Sequence[Item]) -> str:
    """sha256 over everything that is asked, in order: texts, and the bytes of the images."""
    digest = hashlib.sha256()
    for item in items:
        texts = [item.id, item.skill, item.kind, item.question, item.answer]
        digest.update(json.dumps(texts).encode())
        if item.image is not None:
            digest.update(hashlib.sha256(item.image.read_bytes()).digest())
    return digest.hexdigest()


def _file(data: str | Path, name: str) -> Path:
    path = Path(data)
    if path.is_dir():
        path = path / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Give the folder of a suite.")
    return path


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, record) of every line that is not blank."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected an object, got {type(record).__name__}.")
            yield where, record


def _said(record: dict[str, Any], role: str, where: str) -> list[str]:
    """What `role` says in a record's `conversations`, turn by turn."""
    try:
        return [turn["value"] for turn in record["conversations"] if turn["from"] == role]
    except (KeyError, TypeError):
        raise ValueError(
            f"{where}: `conversations` must be a list of turns with `from` and `value`."
        ) from None


def _item(record: dict[str, Any], root: Path, where: str) -> Item:
    for field in FIELDS:
        if record.get(field) in (None, "", []):
            raise ValueError(
                f"{where}: `{field}` is missing or empty. A test record needs {', '.join(FIELDS)}."
            )
    texts = {field: str(record[field]) for field in FIELDS[:-1]}
    image = root / record["image"] if record.get("image") else None
    if image is not None and not image.is_file():
        raise ValueError(f"{where}: its image {image} does not exist.")
    asked = _said(record, "human", where)
    # Training reads `conversations`, evaluation reads the plain fields: they must be one question.
    if asked != [("<image>\n" if image else "") + texts["question"]]:
        raise ValueError(
            f"{where}: its human turns {asked} are not its one `question`, after <image> and a "
            "line break if there is an image."
        )
    return Item(**texts, image=image)


def _check_unique(items: Sequence[Item], path: Path) -> None:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f'{path}: the id "{item.id}" occurs twice. Ids must be unique.')
        seen.add(item.id)
