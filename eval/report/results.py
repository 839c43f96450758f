"""What the demo measured, as plain data: read from its folders, checked, summarised."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

from pydantic import Field, FiniteFloat, model_validator

from eagle_moe.schema import Schema, nearest
from eagle_moe.scores.answer import Answer, read_answers
from eagle_moe.scores.card import ACCURACY, SKILLS, Card, check_total
from eagle_moe.scores.score import TOTAL, Estimate, accuracy_by_skill, chance_of, paired_difference
from eval.identity import describe_machine
from eval.items import read_items, training_answers

MODELS = {
    "mixture": "Mixture",
    "clip_only": "CLIP only",
    "clip_best": "CLIP only, own recipe",
    "blind": "Blind",
    "chance": "Chance",
}
"""Everything that is scored, in the order in which it is shown."""
REQUIRED = ("mixture", "clip_only", "blind", "chance")
COMPARED = ("clip_only", "clip_best", "blind")
"""What the mixture's lead is reported over."""


Parts = dict[str, Estimate]
"""`{"total": ..., skill: ...}`."""


class CurvePoint(Schema):
    """A line of a `curve.jsonl`: exact match on `n` questions of a skill after `step` steps."""

    step: int = Field(ge=0)
    skill: str
    exact_match: float = Field(ge=0, le=1)
    n: int = Field(ge=1)


class Sample(Schema):
    """A question to show: its image, the right answer, and what each model answered."""

    image: Path
    skill: str
    question: str
    answer: str
    predictions: dict[str, str]
    right: dict[str, bool]


class Probe(Schema):
    """Accuracy of a linear probe on each expert's features: `rows[expert]`, one per column."""

    columns: list[str]
    rows: dict[str, list[FiniteFloat]]

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        for expert, row in self.rows.items():
            if len(row) != len(self.columns):
                raise ValueError(f"row {expert} has {len(row)} values for {len(self.columns)}")
        return self


class DemoResults(Schema):
    """Everything that the demo's page shows.

    - `accuracy`: model (a key of `MODELS`) -> `{"total": ..., skill: ...}`.
    - `lead`: reference -> accuracy of the mixture minus that of the reference, question by
      question.
    - `curves`: model -> points of its learning curve.
    - `seconds`: step -> seconds it took, in the order of the steps; `wall_seconds` is less than
      their sum where steps ran side by side.
    - `ask`: the command that asks the model a question.
    - `notes`: sentences to add to the caveats.
    """

    accuracy: dict[str, Parts]
    lead: dict[str, Parts]
    curves: dict[str, list[CurvePoint]]
    seconds: dict[str, FiniteFloat]
    wall_seconds: FiniteFloat | None = None
    samples: list[Sample]
    probe: Probe | None = None
    machine: str
    versions: dict[str, str]
    ask: str = ""
    notes: list[str] = []

    @property
    def models(self) -> list[str]:
        """The scored models, in the order of `MODELS`."""
        return [name for name in MODELS if name in self.accuracy]

    @property
    def skills(self) -> list[str]:
        """The skills, without the total."""
        return [skill for skill in self.accuracy["mixture"] if skill != TOTAL]

    @property
    def samples_by_skill(self) -> dict[str, list[Sample]]:
        grouped: dict[str, list[Sample]] = defaultdict(list)
        for sample in self.samples:
            grouped[sample.skill].append(sample)
        return dict(grouped)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        missing = [name for name in REQUIRED if name not in self.accuracy]
        if missing:
            raise ValueError(f"no score of {', '.join(missing)}; the page needs {REQUIRED}")
        for name in chain(self.accuracy, self.curves):
            if name not in MODELS:
                raise ValueError(f'no model is called "{name}".{nearest(name, MODELS)}')
        asked = {skill: part.n for skill, part in self.accuracy["mixture"].items()}
        for name, parts in self.accuracy.items():
            check_total(parts)
            if {skill: part.n for skill, part in parts.items()} != asked:
                raise ValueError(f"{name} was not asked the same questions as the mixture")
        return self


def gather(
    scores: Mapping[str, str | Path],
    data: str | Path,
    curves: Mapping[str, str | Path],
    seconds: Mapping[str, float],
    *,
    wall_seconds: float | None = None,
    probe: Probe | None = None,
    ask: str = "",
    notes: Sequence[str] = (),
) -> DemoResults:
    """Read everything that the page needs.

    - `scores`: `mixture`, `clip_only`, `blind` and perhaps `clip_best` -> folder of `eval.run`.
    - `data`: the suite folder; chance comes from its training answers, images from its test file.
    - `curves`: model -> `curve.jsonl`.

    Raises `FileNotFoundError` or `ValueError`, naming the file, for what is missing, was counted
    wrongly, or was not measured on the same questions.
    """
    cards, answers = read_scores(scores)
    chance = _chance(answers["mixture"], data)
    fields = {
        "accuracy": {name: card.accuracy for name, card in cards.items()} | {"chance": chance},
        "lead": leads(answers),
        "curves": {name: read_curve(path) for name, path in curves.items()},
        "seconds": dict(seconds),
        "wall_seconds": wall_seconds,
        "samples": choose_samples(answers, data),
        "probe": probe,
        "machine": describe_machine(),
        "versions": cards["mixture"].identity.versions,
        "ask": ask,
        "notes": list(notes),
    }
    return DemoResults.parse(fields, "demo results")


def read_scores(
    scores: Mapping[str, str | Path],
) -> tuple[dict[str, Card], dict[str, list[Answer]]]:
    """Cards and answers of every model, recounted, of the same questions. Raises as `gather`."""
    cards = {name: Card.load(Path(folder) / SKILLS) for name, folder in scores.items()}
    _check_same_task(cards, scores)
    return cards, {name: read_answers(Path(folder) / SKILLS) for name, folder in scores.items()}


def leads(answers: Mapping[str, Sequence[Answer]]) -> dict[str, Parts]:
    """Reference -> accuracy of the mixture minus that of the reference, question by question."""
    return {name: _lead(answers, name) for name in COMPARED if name in answers}


def read_curve(path: str | Path) -> list[CurvePoint]:
    """Read a `curve.jsonl`. Raises `ValueError` naming the line that is no point of a curve."""
    points = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                data = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
            points.append(CurvePoint.parse(data, f"{path}:{number}"))
    return points


def choose_samples(
    answers: Mapping[str, Sequence[Answer]], data: str | Path, per_skill: int = 3
) -> list[Sample]:
    """Per skill the first question that the mixture got wrong and the first that it got right;
    more right ones, or wrong ones if there are not enough, until there are `per_skill`.
    """
    images = {item.id: item.image for item in read_items(data)}
    said = {name: {one.id: one for one in given} for name, given in answers.items()}
    shown = [one for one in answers["mixture"] if images.get(one.id) is not None]
    chosen: list[Answer] = []
    for skill in dict.fromkeys(one.part for one in shown):
        right = [one for one in shown if one.part == skill and _right(one)]
        wrong = [one for one in shown if one.part == skill and not _right(one)]
        kept_wrong = wrong[: max(1, per_skill - len(right))]
        chosen += right[: per_skill - len(kept_wrong)] + kept_wrong
    return [
        Sample(
            image=images[one.id],
            skill=one.part,
            question=one.question,
            answer=one.target,
            predictions={name: given[one.id].prediction for name, given in said.items()},
            right={name: _right(given[one.id]) for name, given in said.items()},
        )
        for one in chosen
    ]


def summarise(results: DemoResults) -> dict[str, Any]:
    """The content of `summary.json`: model -> total and skills -> mean, low, high, n; seconds."""
    plain = results.dump()
    scores = {name: plain["accuracy"][name] for name in results.models}
    return scores | {
        "lead": plain["lead"],
        "seconds": plain["seconds"],
        "wall_seconds": plain["wall_seconds"],
        "machine": plain["machine"],
        "versions": plain["versions"],
    }


def _check_same_task(cards: Mapping[str, Card], scores: Mapping[str, str | Path]) -> None:
    missing = [name for name in REQUIRED if name not in cards and name != "chance"]
    if missing:
        raise ValueError(f"scores: {', '.join(missing)} missing. Give the folder of each.")
    asked = cards["mixture"].identity.task.data_sha256
    for name, card in cards.items():
        task = card.identity.task
        if task.data_sha256 != asked:
            raise ValueError(
                f"{scores[name]}: {name} was not asked the same questions as the mixture. "
                "Evaluate both on the same suite."
            )
        expected = "drop" if name == "blind" else "keep"
        if task.images != expected:
            raise ValueError(
                f'{scores[name]}: {name} was evaluated with images="{task.images}", not '
                f'"{expected}".'
            )


def _chance(asked: Sequence[Answer], data: str | Path) -> Parts:
    known = training_answers(data)
    values = [chance_of(one.target, one.fields["kind"], known) for one in asked]
    return accuracy_by_skill([one.part for one in asked], values)


def _right(answer: Answer) -> bool:
    return answer.scores[ACCURACY] == 1


def _lead(answers: Mapping[str, Sequence[Answer]], reference: str) -> Parts:
    right = {
        name: {one.id: _right(one) for one in answers[name]} for name in ("mixture", reference)
    }
    skill_of = {one.id: one.part for one in answers["mixture"]}
    return paired_difference(right["mixture"], right[reference], skill_of)
