"""Items -> answers: greedy, batched, kept on disk as they come.

`answer_items` knows nothing of models: it forms batches, keeps what is finished, and asks an
`Answerer`. `CheckpointAnswerer` is the one that asks a checkpoint.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from transformers import BatchFeature

from eagle_moe.canvas import load_image
from eval.items import Item
from eval.score import is_correct

ITEMS = "items.jsonl.gz"
OnProgress = Callable[[int, int, str], None]
"""Called with (items done, items in all, note)."""
Images = Literal["keep", "drop"]
"""Whether the model sees the image. `drop` removes it and its placeholder: the blind model."""


@dataclass(frozen=True)
class Answer:
    """What a model answered to one item of a task: a line of `items.jsonl.gz`.

    - `id`: the data set's own, or the number of its row; unique in the file.
    - `part`: the skill or category that is also scored apart; empty where a task has none.
    - `target`: what counts as right, as the task has it: a text, or a list of them.
    - `scores`: metric -> what this item adds to it, for metrics that are made of items' scores.
    - `fields`: short texts and numbers of the data set's row; of the built-in suite, `kind`.
    """

    id: str
    part: str
    question: str
    target: Any
    prediction: str
    scores: dict[str, float]
    fields: dict[str, Any]


class Answerer(Protocol):
    """Whatever can answer a batch of items."""

    def length(self, item: Item) -> int:
        """Tokens of the prompt; image tokens, as many for every item, may be left out."""

    def __call__(self, items: Sequence[Item]) -> list[str]:
        """One answer per item, in order."""


def answer_items(
    items: Sequence[Item],
    answerer: Answerer,
    path: str | Path,
    batch_size: int,
    progress: OnProgress | None = None,
) -> list[Answer]:
    """Answer `items`, streaming to the JSONL file `path`; return the answers in their order.

    Answers already in `path` are kept, so a run that was stopped continues. Batches are of like
    prompt length and the same in every run, whatever was finished before: an answer never depends
    on where the last run stopped.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: it must be at least 1.")
    path = Path(path)
    done = _resume(path, items)
    # the largest batch comes first, so that memory runs out at once or never
    ordered = sorted(items, key=answerer.length, reverse=True)
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            if all(item.id in done for item in batch):
                continue
            for item, prediction in zip(batch, answerer(batch), strict=True):
                if item.id not in done:
                    done[item.id] = _answer(item, prediction)
                    file.write(json.dumps(asdict(done[item.id]), ensure_ascii=False) + "\n")
            file.flush()
            if progress is not None:
                right = sum(one.scores["accuracy"] for one in done.values()) / len(done)
                progress(len(done), len(ordered), f"{right:.0%} right")
    return [done[item.id] for item in items]


def write_answers(folder: str | Path, answers: Sequence[Answer]) -> None:
    """Write `folder/items.jsonl.gz`; the same answers always give the same bytes."""
    path = Path(folder) / ITEMS
    beside = path.with_name(path.name + ".part")
    lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in answers)
    beside.write_bytes(gzip.compress(lines.encode(), mtime=0))
    os.replace(beside, path)


def read_answers(folder: str | Path) -> list[Answer]:
    """Read `folder/items.jsonl.gz`. Raises `ValueError` naming the line that is no answer."""
    path = Path(folder) / ITEMS
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")[:-1]
    except (EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: not a complete file: {error}. Evaluate again.") from None
    return _parse(lines, path)


def _parse(lines: Sequence[str], path: Path) -> list[Answer]:
    answers = []
    for number, line in enumerate(lines, start=1):
        try:
            answers.append(Answer(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not an answer: {error}") from None
    return answers


def _answer(item: Item, prediction: str) -> Answer:
    return Answer(
        id=item.id,
        part=item.skill,
        question=item.question,
        target=item.answer,
        prediction=prediction.strip(),
        scores={"accuracy": float(is_correct(prediction, item.answer))},
        fields={"kind": item.kind},
    )


def _resume(path: Path, items: Sequence[Item]) -> dict[str, Answer]:
    """Answers that an earlier run left in `path`; the torn last line of a killed run is cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {}
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    done = {answer.id: answer for answer in _parse(lines, path)}
    strangers = done.keys() - {item.id for item in items}
    if strangers:
        raise ValueError(
            f'{path}: holds an answer to "{min(strangers)}", which is not asked. Remove the file.'
        )
    return done


class CheckpointAnswerer:
    """Asks a checkpoint: processor, left padding, greedy `generate`, at most `max_new_tokens`."""

    def __init__(
        self, model: Any, processor: Any, images: Images = "keep", max_new_tokens: int = 16
    ) -> None:
        self.model, self.processor = model, processor
        self.images, self.max_new_tokens = images, max_new_tokens
        self.decoding = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}

    @classmethod
    def load(
        cls,
        folder: str | Path,
        images: Images = "keep",
        max_new_tokens: int = 16,
        device: str | None = None,
        dtype: str = "auto",
    ) -> Self:
        """Load a checkpoint folder. `dtype` "auto" is that of its weights; `device` None is a GPU
        if there is one. Raises `ValueError` for a folder that is no complete checkpoint.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        import eagle_moe  # noqa: F401 - makes the Auto classes know `eagle_moe`

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: not a checkpoint folder (it has no config.json).")
        pair: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
        model, loaded = pair
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if loaded.get(fault):
                names = ", ".join(sorted(str(key) for key in loaded[fault])[:5])
                raise ValueError(f"{folder}: {fault.replace('_', ' ')} in its weights: {names}.")
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise ValueError(f"{folder}: `{name}` has a value that is not a finite number.")
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        return cls(model.to(where).eval(), processor, images, max_new_tokens)

    def check(self, items: Sequence[Item]) -> None:
        """Raise `ValueError` if a right answer would not fit into `max_new_tokens`."""
        for item in items:
            needed = len(self.processor.tokenizer(item.answer, add_special_tokens=False).input_ids)
            if needed > self.max_new_tokens:
                raise ValueError(
                    f'item "{item.id}": its answer has {needed} tokens, but max_new_tokens is '
                    f"{self.max_new_tokens}. Raise it."
                )

    def prompt(self, item: Item) -> str:
        """The rendered prompt, with one placeholder where the image goes."""
        return self.processor.apply_chat_template(
            self._messages(item, lambda path: path), add_generation_prompt=True, tokenize=False
        )

    def length(self, item: Item) -> int:
        return len(self.processor.tokenizer(self.prompt(item)).input_ids)

    def encode(self, items: Sequence[Item]) -> BatchFeature:
        """Model inputs of a batch, padded on the left as `generate` needs."""
        return self.processor.apply_chat_template(
            [self._messages(item, load_image) for item in items],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )

    @torch.inference_mode()
    def __call__(self, items: Sequence[Item]) -> list[str]:
        batch = self.encode(items).to(self.model.device)
        tokens = self.model.generate(**batch, **self.decoding)
        new = tokens[:, batch["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)

    def _messages(self, item: Item, load: Callable[[Path], Any]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [{"type": "text", "text": item.question}]
        if item.image is not None and self.images == "keep":
            content.insert(0, {"type": "image", "image": load(item.image)})
        return [{"role": "user", "content": content}]
