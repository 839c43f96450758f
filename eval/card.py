"""A score as it is kept: `card.json` beside `answers.jsonl`, recounted whenever it is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from eagle_moe.schema import Schema
from eval.answer import Answer, read_answers
from eval.identity import Identity
from eval.score import TOTAL, Estimate, accuracy_by_skill, is_correct

CARD = "card.json"
ANSWERS = "answers.jsonl"


class Card(Schema):
    """Accuracy in total and per skill, what produced it, and how long answering took.

    `seconds` is the time spent on the last run's answers alone, without loading the model;
    `questions_per_second` is their number over that time.
    """

    model: str
    accuracy: dict[str, Estimate]
    identity: Identity
    seconds: float = Field(ge=0, allow_inf_nan=False)
    questions_per_second: float = Field(ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _total_follows(self) -> Self:
        check_total(self.accuracy)
        return self

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / CARD, self.dump())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `folder/card.json` and recount it from `folder/answers.jsonl`.

        Raises `FileNotFoundError` without either file, and `ValueError` if a number of the card
        does not follow from the answers, or a `correct` from its prediction.
        """
        folder = Path(folder)
        for name in (CARD, ANSWERS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: no such file. Run `python -m eval.run`.")
        try:
            data = json.loads((folder / CARD).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder / CARD}: not valid JSON: {error}") from None
        card = cls.parse(data, str(folder / CARD))
        recounted = count(read_answers(folder / ANSWERS))
        for key in sorted(recounted.keys() | card.accuracy.keys()):
            if not _same(card.accuracy.get(key), recounted.get(key)):
                raise ValueError(
                    f"{folder / CARD}: `{key}` is {card.accuracy.get(key)}, but the answers beside "
                    f"it give {recounted.get(key)}. One of the files was changed: evaluate again."
                )
        return card


def count(answers: Sequence[Answer]) -> dict[str, Estimate]:
    """Accuracy in total and per skill. Raises `ValueError` if a `correct` is not what it says."""
    for one in answers:
        if one.correct is not is_correct(one.prediction, one.answer):
            raise ValueError(
                f'answer "{one.id}": `correct` is {one.correct}, but the prediction is '
                f'"{one.prediction}" and the answer "{one.answer}".'
            )
    return accuracy_by_skill(
        [one.skill for one in answers], [float(one.correct) for one in answers]
    )


def check_total(accuracy: dict[str, Estimate]) -> None:
    """Raise `ValueError` unless the total is the mean of the skills weighted by questions."""
    parts = [estimate for skill, estimate in accuracy.items() if skill != TOTAL]
    if TOTAL not in accuracy or not parts:
        raise ValueError(f"accuracy needs `{TOTAL}` and at least one skill")
    n = sum(part.n for part in parts)
    mean = sum(part.mean * part.n for part in parts) / n
    if accuracy[TOTAL].n != n or not math.isclose(accuracy[TOTAL].mean, mean, abs_tol=1e-9):
        raise ValueError(
            f"the total ({accuracy[TOTAL].mean:.6f} of {accuracy[TOTAL].n}) does not follow from "
            f"the skills ({mean:.6f} of {n})"
        )


def _same(first: Estimate | None, second: Estimate | None) -> bool:
    """Equal up to what another version of NumPy may resample: a point in the interval's ends."""
    if first is None or second is None:
        return False
    ends = ((first.low, second.low), (first.high, second.high))
    close = all(math.isclose(one, other, abs_tol=0.01) for one, other in ends)
    return first.n == second.n and math.isclose(first.mean, second.mean, abs_tol=1e-9) and close


def write_json(path: Path, data: Any) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)
