"""Record -> token ids and labels, from one rendering of the chat template.

The template itself says which characters the assistant speaks (`{% generation %}` blocks). The
prompt is rendered once and tokenised once; a token is learned when its characters overlap such a
block, end-of-turn token included. Pieces are never tokenised apart, because two pieces rarely
tokenise to what their concatenation does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers.utils.chat_template_utils import render_jinja_template

from eagle_moe.loss import IGNORE_INDEX as IGNORE_INDEX
from train.data.index import identity
from train.data.records import Record
from train.data.release_labels import ReleaseLabels

if TYPE_CHECKING:
    from eagle_moe.processor import EagleMixProcessor

LabelRule = Literal["spans", "release"]
"""Which tokens are learned: the template's spans, or what official training counts
(`train.data.release_labels`)."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and labels of one record, both int64 of shape (T,), and how they came about.

    - `length`: tokens before the cut, image tokens included.
    - `supervised`: tokens with a label, after the cut. 0: the sample teaches nothing.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    length: int
    supervised: int

    @property
    def cut(self) -> bool:
        return len(self.input_ids) < self.length


class Encoder:
    """Encodes records exactly as `processor` encodes the same conversation.

    - `max_length`: tokens to keep, image tokens included; None keeps all.
    - `template`: Jinja text instead of the processor's own chat template.
    - `labels`: the rule that tells which tokens are learned.

    Raises `ValueError` if the template marks no assistant text, the tokenizer gives no offsets, or
    the rule does not know the template.
    """

    def __init__(
        self,
        processor: EagleMixProcessor,
        max_length: int | None,
        template: str | None = None,
        labels: LabelRule = "spans",
    ) -> None:
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self.image_token_id = processor.image_token_id
        self.num_image_tokens = processor.image_seq_length
        chosen = template or processor.chat_template
        if not isinstance(chosen, str) or not _GENERATION.search(chosen):
            raise ValueError(
                "chat template: it has no {% generation %} block, so nothing says which tokens to "
                "learn. Put the assistant's text and its end token between {% generation %} and "
                "{% endgeneration %}."
            )
        self.template = chosen
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"tokenizer: {type(self.tokenizer).__name__} gives no character offsets. Save it "
                "once as a fast tokenizer (with a tokenizer.json) and use that folder."
            )
        self.release_labels = (
            ReleaseLabels(self.tokenizer, chosen, max_length) if labels == "release" else None
        )

    @property
    def identity(self) -> str:
        """A short name for all that decides what this makes of a record, but the code."""
        tokenizer = self.tokenizer
        return identity(
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.special_tokens_map,
            self.template,
            self.num_image_tokens,
            self.max_length,
            self.release_labels is not None and tokenizer.init_kwargs.get("legacy"),
            self.release_labels is not None,
        )

    def __call__(self, record: Record) -> Encoded:
        """Raises `ValueError`, naming the sample, if its image tokens alone do not fit."""
        self.check_fits(record)
        text, spans = self.render(record)
        ids, learned = self._tokenise(text, spans)
        if self.release_labels is not None:
            learned = self.release_labels(text, ids)
        is_image = ids == self.image_token_id
        self._check_images(int(is_image.sum()), record)
        # One placeholder stands for a whole image. Special tokens bound the text around them, so
        # repeating the id afterwards equals repeating the token in the text beforehand.
        repeats = np.where(is_image, self.num_image_tokens, 1)
        ids, is_image = np.repeat(ids, repeats), np.repeat(is_image, repeats)
        learned = np.repeat(learned, repeats) & ~is_image
        length = len(ids)
        keep = self._kept(is_image)
        ids, learned = ids[keep], learned[keep]
        labels = np.where(learned, ids, IGNORE_INDEX)
        return Encoded(ids, labels, length, int(learned.sum()))

    def render(self, record: Record) -> tuple[str, list[tuple[int, int]]]:
        """The prompt of `record` and the character spans in it that the assistant speaks."""
        try:
            # declared as str, but it is (texts, spans of each text)
            rendered: Any = render_jinja_template(
                [record.messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template raises what it likes, TemplateError as a rule
            raise ValueError(f"{record.where}: the chat template refused it: {error}") from error
        texts, spans = rendered
        return texts[0], spans[0]

    def _tokenise(
        self, text: str, spans: list[tuple[int, int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Token ids of `text`, and which of them overlap one of `spans`.

        By overlap, because a token may carry the space before the answer, and because several
        tokens may share one character (the bytes of a rare one).
        """
        bos = self.tokenizer.bos_token
        encoding = self.tokenizer(
            text,
            # as `apply_chat_template` decides: a template that writes its BOS gets no second one
            add_special_tokens=not (bos and text.startswith(bos)),
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids = np.asarray(encoding["input_ids"], dtype=np.int64)
        offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        learned = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            learned |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return ids, learned

    def _check_images(self, placeholders: int, record: Record) -> None:
        if placeholders != len(record.images):
            raise ValueError(
                f"{record.where}: the rendered prompt has {placeholders} image tokens for "
                f"{len(record.images)} images. The chat template must write one per image item."
            )

    def check_fits(self, record: Record) -> None:
        """Raises `ValueError` if the image tokens of `record` alone exceed the limit."""
        image_tokens = len(record.images) * self.num_image_tokens
        if self.max_length is not None and image_tokens > self.max_length:
            raise ValueError(
                f"{record.where}: {len(record.images)} images take {image_tokens} tokens, but the "
                f"limit is {self.max_length} and images are never cut. Raise `max_length` or use "
                "fewer images."
            )

    def _kept(self, is_image: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which tokens stay within `max_length`: every image token, then text from the front."""
        if self.max_length is None:
            return np.ones_like(is_image)
        text_rank = np.cumsum(~is_image)
        return is_image | (text_rank <= self.max_length - int(is_image.sum()))
