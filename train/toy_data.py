"""A tokenizer and a few records, made on the spot: to see a recipe run, not to learn from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200)}
SIDES = {"left": 4, "right": 28}
RECORDS = 12


def write_tokenizer(folder: Path, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token per byte, a BOS in front, and `special` tokens; saved to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=list(special),
        legacy=True,  # labels: release asks for it
    )
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def write_toy_data(path: Path, captions: bool) -> None:
    """Twelve records in LLaVA style and their pictures: coloured squares to the left or right.

    `captions`: one description each. Otherwise conversations of two rounds; one has two pictures,
    one none.
    """
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(RECORDS):
        colour, side = list(COLOURS)[index % 3], list(SIDES)[index % 2]
        name = f"{pictures.name}/{index}.png"
        _draw(COLOURS[colour], SIDES[side]).save(path.parent / name)
        records.append(_record(index, name, colour, side, captions))
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def _draw(colour: tuple[int, int, int], left: int) -> Image.Image:
    picture = Image.new("RGB", (48, 32), (250, 250, 250))
    ImageDraw.Draw(picture).rectangle((left, 8, left + 16, 24), fill=colour)
    return picture


def _record(index: int, picture: str, colour: str, side: str, captions: bool) -> dict[str, Any]:
    if captions:
        said = [("human", "<image>\nDescribe it."), ("gpt", f"A {colour} square on the {side}.")]
        return {"id": str(index), "image": picture, "conversations": _turns(said)}
    said = [
        ("human", "<image>\nWhich colour?"),
        ("gpt", colour),
        ("human", "On which side?"),
        ("gpt", side),
    ]
    record = {"id": str(index), "image": picture, "skill": side, "conversations": _turns(said)}
    if index == 1:
        record["image"] = [picture, picture]
        record["conversations"][0]["value"] = "<image>\n<image>\nWhich colour have both?"
    if index == 2:
        del record["image"]
        record["conversations"] = _turns([("human", "Say yes."), ("gpt", "yes")])
    return record


def _turns(said: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in said]
