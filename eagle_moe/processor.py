"""Text and images -> model inputs; the chat templates."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from eagle_moe.schema import nearest
from eagle_moe.stubs import PROCESSOR_MAP, ByStub, write_stubs

TEMPLATES = Path(__file__).parent / "templates"
IMAGE_TOKEN = "<image>"
_INCLUDE = re.compile(r'\{%- include "(?P<file>[\w-]+\.jinja)" -%\}\n?')


class EagleMixProcessor(ByStub, ProcessorMixin):
    """Image processor and tokenizer as one; every image becomes `image_seq_length` placeholders.

    - `image_seq_length`: tokens per image, `EagleMixConfig.num_image_tokens`.
    - `image_token`: the placeholder, one special token of the tokenizer.

    Batches are padded on the left, as `generate` needs.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 1024,
        image_token: str = IMAGE_TOKEN,
        chat_template: str | None = None,
    ) -> None:
        ids = tokenizer.encode(image_token, add_special_tokens=False)
        seen = tokenizer.decode(ids).strip(), tokenizer.decode(ids, skip_special_tokens=True)
        if len(ids) != 1 or seen != (image_token, ""):
            raise ValueError(
                f"tokenizer: {image_token} must be one special token, but is encoded as {ids}. "
                "Load the tokenizer with "
                f'from_pretrained(..., extra_special_tokens={{"image_token": "{image_token}"}}).'
            )
        self.image_token = image_token
        self.image_token_id = ids[0]
        self.image_seq_length = image_seq_length
        self.auto_map = dict(PROCESSOR_MAP)
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Compare placeholders with images, prompt by prompt where the images are nested so."""
        if text is not None and all(isinstance(prompt, str) for prompt in text):
            self._compare_counts(images, text)
        super().validate_inputs(images=images, text=text, **kwargs)

    def _compare_counts(self, images: Any, text: list[str]) -> None:
        wanted = [prompt.count(self.image_token) for prompt in text]
        nested = isinstance(images, list | tuple) and all(
            isinstance(i, list | tuple) for i in images
        )
        if nested and len(images) == len(text):
            given = [len(group) for group in images]
        else:
            flat = [] if images is None else make_flat_list_of_images(images)
            wanted, given = [sum(wanted)], [len(flat)]
        for index, (placeholders, count) in enumerate(zip(wanted, given, strict=True)):
            if placeholders != count:
                where = f"prompt {index}" if len(wanted) > 1 else "the text"
                raise ValueError(
                    f"{where} has {placeholders} {self.image_token} but {count} images were given."
                )

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the JSON, and the stubs beside it: `save_pretrained` calls it."""
        super().to_json_file(json_file_path)
        write_stubs(Path(json_file_path).parent)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one image."""
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(
        self, image_sizes: list[list[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders per image of each (height, width); read by serving engines."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count
        )


def read_template(name: str) -> str:
    """The chat template `name`, or the one in a `.jinja` file, as one self-contained string.

    Names are those of the files in `TEMPLATES` without a leading underscore. A line
    `{%- include "FILE" -%}` is replaced by that file of `TEMPLATES`: whoever loads a checkpoint has
    its template alone, and no folder to include from.
    Raises `ValueError` with the nearest name, or naming a file that is not there.
    """
    known = sorted(file.stem for file in TEMPLATES.glob("[!_]*.jinja"))
    if name in known:
        return _inlined(TEMPLATES / f"{name}.jinja")
    if name.endswith(".jinja") and Path(name).is_file():
        return _inlined(Path(name))
    raise ValueError(f'template: no "{name}".{nearest(name, known)} Or give a .jinja file.')


def _inlined(path: Path) -> str:
    def included(match: re.Match[str]) -> str:
        part = TEMPLATES / match["file"]
        if not part.is_file():
            parts = [file.name for file in TEMPLATES.glob("*.jinja")]
            raise ValueError(f"{path}: includes {part.name}.{nearest(part.name, parts)}")
        return _inlined(part)

    return _INCLUDE.sub(included, path.read_text(encoding="utf-8"))
