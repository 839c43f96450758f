"""Suites on disk for tests: a few questions of three skills, with images that differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ASKED = {
    "text": ("word", ("lamp", "tree", "door")),
    "chart": ("bar", ("3", "7")),
    "shapes": ("place", ("top left", "centre", "right")),
}
"""Skill -> kind, answers."""


def make_record(name: str, skill: str = "text", **changes: Any) -> dict[str, Any]:
    """A test record; a change to None removes the field."""
    question, answer = f"what is {name}", f"word {name}"
    record = {
        "id": name,
        "image": f"images/{name}.png",
        "skill": skill,
        "kind": "word",
        "question": question,
        "answer": answer,
        "conversations": make_turns((f"<image>\n{question}", answer)),
    }
    return {key: value for key, value in (record | changes).items() if value is not None}


def make_turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": value}
        for pair in pairs
        for speaker, value in zip(("human", "gpt"), pair, strict=True)
    ]


def write_records(folder: Path, *records: dict[str, Any], name: str = "test.jsonl") -> Path:
    """Write the records and a small image, different for each, wherever one is named."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index, record in enumerate(records):
        if record.get("image"):
            pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / record["image"])
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / name).write_text(lines, encoding="utf-8")
    return folder


def write_suite(folder: Path, per_skill: int = 4) -> Path:
    """`test.jsonl`, `train.jsonl` and images; prompts of different lengths, all answers known."""
    asked, taught = [], []
    for skill, (kind, answers) in ASKED.items():
        for index in range(per_skill):
            question = f"what is the {kind} {'far ' * (index % 3)}here"
            answer = answers[index % len(answers)]
            asked.append(
                make_record(
                    f"test-{skill}-{index}",
                    skill,
                    kind=kind,
                    question=question,
                    answer=answer,
                    conversations=make_turns((f"<image>\n{question}", answer)),
                )
            )
        pairs = [(f"what is the {kind} here", answer) for answer in answers]
        pairs[0] = (f"<image>\n{pairs[0][0]}", pairs[0][1])
        name = f"train-{skill}"
        taught.append(
            {
                "id": name,
                "image": f"images/{name}.png",
                "skill": skill,
                "kinds": [kind] * len(pairs),
                "conversations": make_turns(*pairs),
            }
        )
    write_records(folder, *taught, name="train.jsonl")
    write_records(folder, *asked)
    (folder / "suite.json").write_text(json.dumps({"version": 3, "seed": 5}))
    return folder
