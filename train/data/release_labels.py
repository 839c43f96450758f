"""Labels as official Eagle training makes them, to repeat it exactly: by counting tokens.

The official code cuts the prompt into rounds, tokenises each round and its question on their own,
and masks as many tokens as it counted. Pieces do not always tokenise as the whole does, hence the
corrections in `_counting`. Where the counts do not add up to the length of the sample, all of it is
masked and teaches nothing. `train.data.labels` has the rule that needs no counting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eagle_moe.processor import IMAGE_TOKEN, read_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = ("plain", "vicuna", "llama3", "llama3-release", "yi", "llama2")
"""Chat templates that the official code has a rule for."""


@dataclass(frozen=True)
class Counting:
    """How rounds are cut, and what is added to the tokens counted in their pieces.

    - `mark`: text that ends a question; `end`: text that ends an answer.
    - `turns_end`: whether `end` stands after questions and the system text, too.
    - `start`: tokens before the first round, all masked.
    - `length`, `question`: added to the tokens of a round and of its question; `later`: to both,
      from the second round on.
    """

    mark: str
    end: str
    turns_end: bool
    start: int
    length: int
    question: int
    later: int

    def rounds(self, prompt: str) -> Iterator[str]:
        """Question and answer together, without the last `end`; the first with the system text."""
        pieces = prompt.split(self.end)
        first, step = (3, 2) if self.turns_end else (1, 1)
        yield self.end.join(pieces[:first])
        for at in range(first, len(pieces), step):
            yield self.end.join(pieces[at : at + step])


class ReleaseLabels:
    """The official rule for one chat template and tokenizer.

    `limit` is the longest sample in tokens, an image counting as one; None: there is no limit.
    Raises `ValueError` if the official code has no rule for `template` (its text) or `tokenizer`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, limit: int | None
    ) -> None:
        self.tokenizer = tokenizer
        self.limit = limit
        names = [name for name in TEMPLATES if read_template(name) == template]
        if not names:
            raise ValueError(
                "labels: release: the chat template is none of those that official training has "
                f"({', '.join(TEMPLATES)}). Name one of them as `template`, or use `labels: spans`."
            )
        self.counting = None if names[0] == "plain" else _counting(names[0], tokenizer)

    def __call__(self, prompt: str, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `ids`, (T,), are learned. They are `prompt`'s, with one token per image."""
        if self.counting is None:
            before, image, _ = prompt.rpartition(IMAGE_TOKEN)
            return np.arange(len(ids)) >= self._count(before + image)
        # The official prompt has one BOS less than a template that writes them all: see `_count`.
        prompt = prompt.removeprefix(self.tokenizer.bos_token or "")
        learned = np.ones(len(ids), dtype=bool)
        at = self.counting.start
        learned[:at] = False
        for number, part in enumerate(self.counting.rounds(prompt)):
            if part.count(self.counting.mark) != 1:
                break
            question = part.partition(self.counting.mark)[0] + self.counting.mark
            later = self.counting.later if number else 0
            masked = self._count(question) + self.counting.question + later
            learned[at : at + masked] = False
            at += self._count(part) + self.counting.length + later
        learned[at:] = False
        length = np.count_nonzero(ids != self.tokenizer.pad_token_id)
        if at != length and (self.limit is None or at < self.limit):
            learned[:] = False
        return learned

    def _count(self, text: str) -> int:
        """Tokens of `text`, with the BOS that the tokenizer adds if it adds one."""
        return len(self.tokenizer(text, verbose=False)["input_ids"])


def _counting(template: str, tokenizer: PreTrainedTokenizerBase) -> Counting:
    """The corrections, and what each makes up for.

    Questions that end in a space count it as a token, but it goes to the answer's first word: -1;
    another -1 for the BOS, which `start` counted.
    """
    if template == "llama2":
        return Counting("[/INST] ", "</s>", False, 1, 0, -2, 0)
    if template in ("llama3", "llama3-release"):
        # +1: the end token of the answer; -1: the BOS of a round tokenised on its own
        mark = "<|start_header_id|>assistant<|end_header_id|>\n\n"
        return Counting(mark, "<|eot_id|>", True, 0, 1, 0, -1)
    legacy = getattr(tokenizer, "legacy", tokenizer.init_kwargs.get("legacy"))
    if legacy is None:
        raise ValueError(
            "labels: release: this template's counts depend on the tokenizer's `legacy`, which "
            f"this {type(tokenizer).__name__} does not have. Use the one that "
            "`eagle_moe.interop.tokenizer.load_release_tokenizer` reads, or `labels: spans`."
        )
    if template == "vicuna":
        # -1: a round begins with a space on its own, but not after </s> (if not legacy)
        return Counting(" ASSISTANT: ", "</s>", False, 1, 0, -2, 0 if legacy else -1)
    # +1: the end token of the answer; forgotten if not legacy, so no count is ever right then
    mark = "<|im_end|><|im_start|>assistant\n"
    return Counting(mark, "<|im_end|>", True, 0, int(legacy), int(legacy) - 1, 0)
