"""Write the suite to disk: `python -m eval.skills --out DIR`.

    DIR/train.jsonl     conversations: several questions about one image
    DIR/captions.jsonl  the same images, each with its transcript as the caption
    DIR/test.jsonl      one question per image, held-out content
    DIR/images/*.png
    DIR/suite.json      what it was made with

Every sample depends on the suite's seed, the split, the skill and its own number alone, so any
of them can be made again, alone, anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from eval.skills import chart, form, handwriting, shapes, text
from eval.skills.content import Split
from eval.skills.scene import Scene

VERSION = 2
"""Part of every score's identity; raise it when a change moves scores."""
SKILLS: dict[str, Callable[..., Scene]] = {
    "text": text.make,
    "chart": chart.make,
    "form": form.make,
    "shapes": shapes.make,
    "handwriting": handwriting.make,
}
MAX_TURNS = 5


def make_rng(seed: int, split: str, skill: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, crc32(f"{split}/{skill}".encode()), index])


def make_scene(skill: str, split: Split, index: int, seed: int = 0, *, paint: bool = True) -> Scene:
    """Scene number `index` of a skill; the same every time. `paint=False`: without its image."""
    return SKILLS[skill](make_rng(seed, split, skill, index), split, paint)


def _records(item: tuple[str, Split, int], out: Path, seed: int) -> tuple[str, str]:
    """Write one image; return its JSON lines for the main file and for the captions."""
    from PIL import Image

    skill, split, index = item
    rng = make_rng(seed, split, skill, index)
    scene = SKILLS[skill](rng, split)
    name = f"{split}-{skill}-{index:06d}"
    file = f"images/{name}.png"
    Image.fromarray(scene.image).save(out / file, compress_level=1)
    record: dict[str, Any] = {"id": name, "image": file, "skill": skill}
    if split == "test":
        # a kind first, then a question of it: kinds with more questions per image do not dominate
        kinds = sorted({q.kind for q in scene.questions})
        kind = kinds[int(rng.integers(len(kinds)))]
        choices = [q for q in scene.questions if q.kind == kind]
        asked = [choices[int(rng.integers(len(choices)))]]
        record |= {"kind": kind, "question": asked[0].question, "answer": asked[0].answer}
    else:
        order = rng.permutation(len(scene.questions))[:MAX_TURNS]
        asked = [scene.questions[i] for i in order]
        record["kinds"] = [q.kind for q in asked]
    record["conversations"] = turns([(q.question, q.answer) for q in asked])
    caption = {key: record[key] for key in ("id", "image", "skill")}
    caption["conversations"] = turns([("transcribe", scene.transcript)])
    return json.dumps(record), json.dumps(caption)


def _map(function: Callable[..., Any], items: list[Any], workers: int, stack: ExitStack) -> Any:
    """`map`, in this process or in `workers` of them that live as long as `stack`."""
    if workers == 1:
        return map(function, items)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    return stack.enter_context(pool).map(function, items, chunksize=200)


def turns(pairs: list[tuple[str, str]], first: str = "<image>\n") -> list[dict[str, str]]:
    """Question and answer pairs as a conversation; `first` stands before the first question."""
    conversation = []
    for index, (question, answer) in enumerate(pairs):
        asked = question if index else first + question
        conversation.append({"from": "human", "value": asked})
        conversation.append({"from": "gpt", "value": answer})
    return conversation


def _items(train: int, test: int) -> Iterator[tuple[str, Split, int]]:
    for index in range(train):
        yield from ((skill, "train", index) for skill in SKILLS)
    for index in range(test):
        yield from ((skill, "test", index) for skill in SKILLS)


def write_suite(
    out: str | Path,
    train: int = 2000,
    test: int = 250,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `train` and `test` images per skill under `out`, with `workers` processes.

    The files do not depend on `workers`. `progress(done, total)` is called as samples finish.
    """
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    items = list(_items(train, test))
    lines: dict[str, list[str]] = {"train": [], "captions": [], "test": []}
    with ExitStack() as stack:
        done = _map(partial(_records, out=out, seed=seed), items, workers, stack)
        for count, ((_, split, _), (record, caption)) in enumerate(
            zip(items, done, strict=True), start=1
        ):
            lines[split].append(record)
            if split == "train":
                lines["captions"].append(caption)
            if progress and count % 200 == 0:
                progress(count, len(items))
    for name, rows in lines.items():
        (out / f"{name}.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    made = {"version": VERSION, "seed": seed, "train": train, "test": test, "skills": [*SKILLS]}
    (out / "suite.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return out
