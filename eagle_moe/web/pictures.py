"""Example questions, and the images over which maps of silenced experts are averaged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

BUILT_IN = Path(__file__).parent / "examples"
"""One question of each skill of the built-in suite: the first of its test questions."""
EXAMPLES = 5
"""Example questions on the page."""
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
"""How names of image files end."""


@dataclass(frozen=True)
class Example:
    """A question about an image; `skill` is what it tries."""

    image: Path
    question: str
    skill: str


def read_examples(suite: Path) -> list[Example]:
    """The questions with images in `suite/test.jsonl`, in their order.

    Raises `ValueError` naming the file and the line.
    """
    path = suite / "test.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{suite}: no test.jsonl in it, so there are no example questions. Give a suite's "
            "folder, as `python -m eval.skills --out DIR` makes one."
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [_example(line, path, number) for number, line in enumerate(lines, start=1)]
    return [example for example in found if example is not None]


def choose_examples(suite: Path) -> list[Example]:
    """The first question of each skill, at most `EXAMPLES`."""
    first: dict[str, Example] = {}
    for example in read_examples(suite):
        first.setdefault(example.skill, example)
    return list(first.values())[:EXAMPLES]


def reference_images(folder: Path, count: int) -> list[Path]:
    """`count` images of a suite's folder (the first of its questions), or of a folder of images.

    From a folder of images they are taken evenly over their names. Raises `ValueError` if there
    is none.
    """
    if count < 1:
        raise ValueError(f"--reference-count {count}: the mean needs one image or more.")
    if (folder / "test.jsonl").is_file():
        return list(dict.fromkeys(example.image for example in read_examples(folder)))[:count]
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of reference images.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)
    if not paths:
        raise ValueError(f"{folder}: no images in it ({', '.join(sorted(IMAGES))}).")
    taken = min(count, len(paths))
    return [paths[index * len(paths) // taken] for index in range(taken)]


def _example(line: str, path: Path, number: int) -> Example | None:
    try:
        record = json.loads(line)
        if not record.get("image"):
            return None
        image = path.parent / record["image"]
        found = Example(image, str(record["question"]), str(record.get("skill", "")))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}, line {number}: not a suite's question ({error!r}). It needs `image` and "
            "`question`."
        ) from None
    if not image.is_file():
        raise ValueError(f"{path}, line {number}: {image} is not there.")
    return found
