"""One run of lmms-eval in a process of its own: `python -m eval.harness SETTINGS.json`.

`eval.run` starts it, or torchrun does, once per process. Importing lmms-eval changes the process
that does it (logging, file locks, SSL), some of its scorers count in globals, and its command line
ends with 0 when a run failed: here every task runs once per process, and an error is an error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from eagle_moe.answer import MAX_NEW_TOKENS, Answerer, Images
from eagle_moe.schema import Schema
from eagle_moe.scores.answer import ITEMS, write_answers
from eagle_moe.scores.card import CARD, SKILLS, Card
from eagle_moe.scores.identity import Identity
from eval.engine import gathered, process_group, processes, rank, score
from eval.identity import identify
from eval.kept import KeptTexts, OnProgress
from eval.outcome import Outcome

MARK = "\x1eeval "
"""Begins every line of this process's output that is for the one that started it."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Settings(Schema):
    """Of one run. `tasks` are names of single tasks; see `eval.run` for the others."""

    model: str
    tasks: list[str] = Field(min_length=1)
    data: str | None = None
    out: str
    images: Images = "keep"
    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    device: str | None = None
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit}: at least one question must be asked")
        if self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size}: it must be at least 1")
        return self

    def cap(self, task: str) -> int:
        """Tokens that an answer may have at most, whatever the task says."""
        return self.max_new_tokens or (16 if task == SKILLS else MAX_NEW_TOKENS)


class RunFailed(RuntimeError):
    """Names every task that failed, and why."""


def run_tasks(settings: Settings, progress: OnProgress | None = None) -> dict[str, Card]:
    """Every task of the run: task -> card, which then stands in `out/<task>`.

    A task that fails does not keep the others from running, unless several processes share the
    work. Then, and after the last one, `RunFailed` names what failed.
    """
    if settings.data is not None:
        go_offline()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with process_group():
        answerer = _load(settings)
        cards: dict[str, Card] = {}
        failed: dict[str, Exception] = {}
        for name in settings.tasks:
            try:
                card = _run_task(name, settings, answerer, progress)
                cards |= {name: card} if card else {}
            except Exception as error:
                if processes() > 1 or len(settings.tasks) == 1:
                    raise
                traceback.print_exc()
                failed[name] = error
    if failed:
        lines = [f"{name}: {error}" for name, error in failed.items()]
        raise RunFailed(
            f"{len(failed)} of {len(settings.tasks)} tasks failed.\n" + "\n".join(lines)
        )
    return cards


def go_offline() -> None:
    """Keep the Hugging Face libraries off the network: local data sets are then all there is."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    # what has been imported already has read its environment before
    from datasets import config
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True


def _load(settings: Settings) -> Answerer:
    from eagle_moe.integrations.lmms_eval import default_device

    device = settings.device or default_device()
    return Answerer.load(settings.model, settings.images, device=device, dtype=settings.dtype)


def _run_task(
    name: str, settings: Settings, answerer: Answerer, progress: OnProgress | None
) -> Card | None:
    """The card of one task; None on other processes than the first."""
    from eagle_moe.integrations.lmms_eval import EagleMixBackend
    from eval.tasks.catalogue import load_task

    data = Path(settings.data).absolute() if settings.data else None
    out = Path(settings.out).absolute() / name
    task = load_task(name, data, settings.limit)
    answerer.max_new_tokens = settings.cap(name)
    if name == SKILLS:
        _check_answers_fit(answerer, task)
    identity = _identify(task, settings, answerer)
    card = _finished(out, identity)
    if card is not None:
        if progress is not None:
            progress(len(task.eval_docs), len(task.eval_docs), f"{name}: finished before")
        return card
    backend = EagleMixBackend(
        answerer=answerer,
        batch_size=settings.batch_size,
        answers=KeptTexts(out / f"answers.{identity.sha256[:12]}.{rank()}.part.jsonl"),
        on_answers=None if progress is None else _with_rate(progress, name),
    )
    beyond = answerer.beyond
    outcome = score(backend, task, out, settings.limit)
    work = _work(backend, answerer.beyond - beyond)
    if outcome is None:
        return None
    card = _card(settings.model, identity, outcome, work)
    _keep(out, card, outcome)
    return card


def _check_answers_fit(answerer: Answerer, task: Any) -> None:
    """Raise `ValueError` if a right answer of the built-in suite is longer than the cap."""
    for item in task.items:
        needed = answerer.length(item.answer)
        if needed > answerer.max_new_tokens:
            raise ValueError(
                f'item "{item.id}": its answer has {needed} tokens, but max_new_tokens is '
                f"{answerer.max_new_tokens}. Raise it."
            )


def _identify(task: Any, settings: Settings, answerer: Answerer) -> Identity:
    from eagle_moe.integrations.lmms_eval import settings_of, to_conversation
    from eval.tasks.catalogue import describe

    asked = describe(task, settings.images, settings.limit)
    messages = task.doc_to_messages(task.eval_docs[0])
    return identify(
        settings.model,
        answerer,
        asked,
        to_conversation(messages, f"{asked.name}, question 0"),
        settings_of(task.config.generation_kwargs),
        settings.batch_size,
        processes(),
    )


def _finished(out: Path, identity: Identity) -> Card | None:
    if not (out / CARD).is_file() or not (out / ITEMS).is_file():
        return None
    try:
        card = Card.load(out)
    except ValueError:  # damaged, or of an older version: evaluated again
        return None
    return card if card.identity == identity else None


def _keep(out: Path, card: Card, outcome: Outcome) -> None:
    (out / CARD).unlink(missing_ok=True)  # never a card beside items that are not its own
    write_answers(out, outcome.answers)
    card.save(out)
    for stale in out.glob("answers.*.part.jsonl"):
        stale.unlink()


def _with_rate(progress: OnProgress, name: str) -> Callable[[int, int], None]:
    start = time.perf_counter()

    def report(done: int, total: int) -> None:
        progress(done, total, f"{name}: {done / (time.perf_counter() - start):.1f}/s")

    return report


def _work(backend: Any, beyond: int) -> dict[str, float]:
    """What all processes did together: questions, images; seconds of the slowest."""
    own = {
        "asked": backend.asked,
        "images_seen": backend.images_seen,
        "images_encoded": backend.images_encoded,
        "beyond": beyond,
        "seconds": backend.seconds,
    }
    every = gathered(own)
    summed = {key: sum(one[key] for one in every) for key in own}
    return summed | {"seconds": max(one["seconds"] for one in every)}


def _card(model: str, identity: Identity, outcome: Outcome, work: dict[str, float]) -> Card:
    notes = []
    if work["beyond"]:
        notes.append(
            f"{work['beyond']} questions were, with their answers, longer than the language model "
            "was made for."
        )
    return Card(
        model=model,
        primary=outcome.primary,
        metrics=outcome.metrics,
        means=outcome.means,
        not_run=outcome.not_run,
        notes=notes,
        identity=identity,
        seconds=round(work["seconds"], 3),
        questions_per_second=round(work["asked"] / max(work["seconds"], 1e-9), 2),
        images_seen=int(work["images_seen"]),
        images_encoded=int(work["images_encoded"]),
    )


def tell(kind: str, **content: Any) -> None:
    """A line for the process that started this one; if that is gone, this one ends."""
    print(f"{MARK}{json.dumps({'kind': kind} | content)}", flush=True)


def main(path: str) -> int:
    """Run the settings in the file `path`; 2 means that the person must change something."""
    settings = Settings.parse(json.loads(Path(path).read_text(encoding="utf-8")), path)
    first = os.environ.get("RANK", "0") == "0"

    def progress(done: int, total: int, note: str) -> None:
        if first:
            tell("progress", done=done, total=total, note=note)

    try:
        run_tasks(settings, progress)
    except (FileNotFoundError, ValueError, RunFailed) as error:
        traceback.print_exc()
        tell("error", type=type(error).__name__, message=str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
