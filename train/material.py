"""What every mini run starts from: the suite, text, a reader, experts with their first sight.

Made on the spot by jobs (`train.jobs`), without a download; the sizes are in `configs/demo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from eagle_moe.schema import Schema, load_yaml
from eval.skills.suite import VERSION
from train.jobs import Job, progress


class Pretext(Schema):
    """Size of one expert's pretext training; see `train.pretrain.experts.pretrain_expert`."""

    steps: int = Field(gt=0)
    batch_size: int = Field(32, gt=0)
    scenes: int = Field(4000, gt=0)


class MaterialSettings(Schema):
    """Sizes of the material."""

    reader: str
    """Recipe of the language model."""
    suite: dict[str, int]
    """Images per skill: `train`, `test`."""
    corpus: dict[str, int]
    """Texts: `documents`, `copies`."""
    pretexts: dict[str, Pretext]
    """Expert -> size of its pretext training."""
    reader_overrides: list[str] = []


# -- jobs: each runs in a process of its own and leaves its result in `out`


def make_suite(out: Path, train: int, test: int) -> None:
    from eval.skills import write_suite

    write_suite(out, train, test, progress=lambda n, of: progress(n, of, "images"))


def make_corpus(out: Path, documents: int, copies: int) -> None:
    from train.pretrain.corpus import write_corpus
    from train.pretrain.tokenizer import write_tokenizer

    write_tokenizer(out / "tokenizer")
    write_corpus(out / "corpus.jsonl", documents, copies, progress=progress)


def make_expert(out: Path, entry: Any, **size: Any) -> None:
    from train.pretrain.experts import pretrain_expert

    pretrain_expert(entry, out, **size, progress=progress)


def make_stage(
    out: Path, recipe: str, stage: str, overrides: Sequence[str], expert: str | None = None
) -> None:
    """One run of a recipe; `out` is where the job is kept, the checkpoint goes where it says."""
    from train.run import run_stage

    run_stage(recipe, stage, expert, overrides, redo=True)


# -- the graph


class Material:
    """The jobs that make it under `root`, and how a recipe is told to use it."""

    def __init__(self, settings: MaterialSettings, root: Path) -> None:
        self.settings = settings
        self.root = root
        self.suite, self.text = root / "suite", root / "text"
        self.reader = f"{{checkpoint: {root}/reader/read, parts: [language_model]}}"

    def jobs(self) -> list[Job]:
        """Jobs `suite`, `text`, `reader` and `eyes/<expert>`, those that take longest first."""
        told = self.settings
        made = partial(Job, version=f"suite {VERSION}")  # all three draw its scenes
        reader = [
            f"output_dir={self.root}/reader",
            f"data.corpus.path={self.text}/corpus.jsonl",
            self._tokenizer,
            *told.reader_overrides,
        ]
        read = {"recipe": told.reader, "stage": "read", "overrides": reader}
        entries = {e["name"]: e for e in load_yaml("configs/models/mini.yaml")["experts"]}
        eyes = [
            made(f"eyes/{name}", make_expert, {"entry": entries[name], **size.dump()}, out)
            for name, size in told.pretexts.items()
            for out in [self.root / "experts" / name]
        ]
        return [
            made("text", make_corpus, told.corpus, self.text),
            Job("reader", make_stage, read, self.root / "jobs" / "reader", ("text",)),
            made("suite", make_suite, told.suite, self.suite),
            *eyes,
        ]

    def overrides(self) -> list[str]:
        """What makes a recipe with the stages of `configs/recipes/mini.yaml` start from here."""
        return [
            f"stages.pre_align.init_from=[{self.reader}]",
            f"stages.align.init_from=[{self.reader}, pre_align]",
            f"data.captions.path={self.suite}/captions.jsonl",
            f"data.questions.path={self.suite}/train.jsonl",
            f"data.held_out.path={self.suite}/test.jsonl",
            self._tokenizer,
        ]

    def init_experts(self, names: Sequence[str]) -> str:
        """The override that has the experts `names`, all that the model has, start from here."""
        places = ", ".join(f"{name}: {self.root}/experts/{name}" for name in names)
        return f"init.experts={{{places}}}"

    @property
    def _tokenizer(self) -> str:
        return f"model.language_model.tokenizer={self.text}/tokenizer"
