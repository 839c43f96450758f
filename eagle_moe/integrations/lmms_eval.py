"""lmms-eval asks our models: its chat backend, registered by entry point as `eagle_moe`.

    lmms-eval --model eagle_moe --model_args pretrained=runs/demo/model --tasks pope

It needs the extra `eval`. `eval.run` of the repository does more: identity, resuming, local data.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm.auto import tqdm
from transformers import BatchFeature

from eagle_moe.answer import MAX_NEW_TOKENS, Answerer, Images


@dataclass(frozen=True)
class Request:
    """What `Instance.args` of a chat task holds, and where it stands among the requests."""

    index: int
    key: str
    text: str
    conversation: Callable[[], list[dict[str, Any]]]
    settings: tuple[tuple[str, Any], ...]


class EagleMixBackend(lmms):
    """Answers the questions of chat tasks, in batches of like length.

    - `pretrained`: checkpoint folder; or give an `answerer`.
    - `answers`: texts that are known already, and where new ones are put; by `key_of`. A batch is
      asked again if one of its answers is missing: batches are the same in every run.
    - `on_answers(done, total)`: called after every batch; default: a progress bar.

    After a run, `asked` questions were answered in `seconds`, without those that were known.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        images: Images = "keep",
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        max_new_tokens: int | str = MAX_NEW_TOKENS,
        answerer: Answerer | None = None,
        answers: MutableMapping[str, str] | None = None,
        on_answers: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        if (pretrained is None) == (answerer is None):
            raise ValueError("pretrained: give the folder of a checkpoint (or an answerer).")
        if answerer is None:
            assert pretrained is not None
            where = device or default_device()
            answerer = Answerer.load(pretrained, images, int(max_new_tokens), where, dtype)
        self.answerer = answerer
        self.batch_size = _batch_size(batch_size)
        self.answers = answers
        self.on_answers = on_answers
        self._before = answerer.memory.seen, answerer.memory.encoded
        self.seconds = 0.0
        self.asked = 0

    @property
    def images_seen(self) -> int:
        return self.answerer.memory.seen - self._before[0]

    @property
    def images_encoded(self) -> int:
        return self.answerer.memory.encoded - self._before[1]

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts the counts that processes exchange."""
        return torch.device(self.answerer.model.device)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One text per request, in their order."""
        texts = [""] * len(requests)  # requests that only fill up a process stay unanswered
        asked = [
            self._request(index, one)
            for index, one in enumerate(requests)
            if not one.metadata.get("__padding_only__")
        ]
        start = time.perf_counter()
        done = 0
        with tqdm(total=len(asked), disable=self.on_answers is not None or self.rank > 0) as bar:
            for batch, answers in self._answered(list(self._batches(asked))):
                for request, text in zip(batch, answers, strict=True):
                    texts[request.index] = text
                done += len(batch)
                bar.update(len(batch))
                if self.on_answers is not None:
                    self.on_answers(done, len(asked))
        self.seconds += time.perf_counter() - start
        logger.info(
            f"{self.asked} questions in {self.seconds:.1f} s; images: {self.images_seen} seen, "
            f"{self.images_encoded} encoded"
        )
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "eagle_moe answers tasks of the output type generate_until; choose the variant of the "
            "task that generates."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("eagle_moe answers questions of a single round.")

    def _request(self, index: int, instance: Instance) -> Request:
        text, to_messages, settings, doc_id, task, split = instance.args

        def conversation() -> list[dict[str, Any]]:
            messages = to_messages(self.task_dict[task][split][doc_id])
            return to_conversation(messages, f"{task}, question {doc_id}")

        options = tuple(settings_of(settings).items())
        return Request(index, key_of(instance), text, conversation, options)

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Of equal settings and like length; the longest first, so that memory ends at once."""
        groups: dict[Hashable, list[Request]] = defaultdict(list)
        for request in requests:
            groups[request.settings].append(request)
        for group in groups.values():
            group.sort(key=lambda request: self.answerer.length(request.text), reverse=True)
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _answered(
        self, batches: Sequence[list[Request]]
    ) -> Iterator[tuple[list[Request], list[str]]]:
        """Every batch with its answers: the known ones, then the others as they are answered."""
        known = self.answers if self.answers is not None else {}
        todo = []
        for batch in batches:
            if all(one.key in known for one in batch):
                yield batch, [known[one.key] for one in batch]
            else:
                todo.append(batch)
        for batch, inputs in zip(todo, self._encoded(todo), strict=True):
            texts = self.answerer.generate(inputs, **dict(batch[0].settings))
            self.asked += len(batch)
            for request, text in zip(batch, texts, strict=True):
                known.setdefault(request.key, text)
            # one that was known stays as it was: it may have been counted on
            yield batch, [known[request.key] for request in batch]

    def _encoded(self, batches: Sequence[list[Request]]) -> Iterator[BatchFeature]:
        """Model inputs of each batch; those of the next are made while one is being answered."""

        def encode(batch: list[Request]) -> BatchFeature:
            return self.answerer.encode([request.conversation() for request in batch])

        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting = [pool.submit(encode, batch) for batch in batches[:1]]
            for batch in batches[1:]:
                waiting.append(pool.submit(encode, batch))
                yield waiting.pop(0).result()
            for last in waiting:
                yield last.result()


def key_of(request: Instance) -> str:
    """Names a question: the same in every run of the same task on the same data."""
    *_, task, split = request.args
    return f"{task}/{split}/{request.doc_id}/{request.idx}"


def default_device() -> str:
    """The GPU of this process of a torchrun, the one GPU, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def _batch_size(value: int | str) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"batch_size = {value}: give a number of at least 1.")
    return int(value)


def settings_of(told: dict[str, Any]) -> dict[str, Any]:
    """What `Answerer.generate` takes of a task's generation settings.

    How to sample is left out: answers are greedy, whatever a task says.
    """
    until = told.get("until") or ()
    return {
        "until": (until,) if isinstance(until, str) else tuple(until),
        "max_new_tokens": told.get("max_new_tokens"),
        "num_beams": told.get("num_beams") or 1,
    }


def to_conversation(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Messages of lmms-eval, which has images under "url", as chat templates take them.

    Raises `ValueError` naming the question, `where`, for what is neither text nor an image.
    """
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [_part(part, where) for part in message["content"]]}
        for message in messages
    ]


def _part(part: dict[str, Any], where: str) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    if part["type"] == "image":
        return {"type": "image", "image": part.get("image", part.get("url"))}
    raise ValueError(f"{where}: it has a part of the type {part['type']}; eagle_moe reads images.")
