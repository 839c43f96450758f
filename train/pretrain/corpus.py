"""What the mini LLM reads before it sees: scenes drawn with characters, and questions about them.

A full-size LLM has read the web, pictures made of characters included, before anyone shows it an
image. The mini LLM has read this: the transcript of a scene stands where the image will stand.
The corpus is text-only training data in the ordinary format, so an ordinary stage learns it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from eval.skills import SKILLS, make_scene
from eval.skills.scene import SYMBOLS
from eval.skills.suite import MAX_TURNS, make_rng, turns

FIRST_INDEX = 2_000_000
"""Scene numbers from here on: neither the suite's scenes nor those of the pretext tasks."""


def write_corpus(
    out: str | Path,
    documents: int = 10_000,
    copies: int = 1_000,
    seed: int = 0,
    progress: Callable[[float, float, str], None] | None = None,
) -> Path:
    """Write `out` (JSON lines): `documents` to question, and `copies` to write down again.

    Transcripts to copy have random symbols strewn over them, so that copying needs looking.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    skills = list(SKILLS)
    with out.open("w", encoding="utf-8") as file:
        for number in range(documents + copies):
            skill = skills[number % len(skills)]
            rng = make_rng(seed, "corpus", skill, number)
            scene = make_scene(skill, "train", FIRST_INDEX + number, seed, paint=False)
            cells = list(scene.cells)
            if number < documents:
                order = rng.permutation(len(scene.questions))[:MAX_TURNS]
                asked = [scene.questions[i] for i in order]
                pairs = [(q.question, q.answer) for q in asked]
            else:
                for spot in rng.permutation(len(cells))[: int(rng.integers(4, 24))]:
                    cells[spot] = SYMBOLS[int(rng.integers(1, len(SYMBOLS)))]
                pairs = [("transcribe", "".join(cells))]
            conversation = turns(pairs, "".join(cells) + "\n")
            record = {"id": f"corpus-{number:06d}", "skill": skill, "conversations": conversation}
            file.write(json.dumps(record) + "\n")
            if progress and number % 200 == 0:
                progress(number, documents + copies, "documents")
    return out
