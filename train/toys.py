"""What a shrunken recipe starts from and learns from, made on the spot: to see it run, no more.

A toy is a folder named after all that determines it, so that the next recipe finds it there. It is
written beside its place and renamed; of several processes that make it, the first to finish has.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from eagle_moe.checkpoint import save_expert
from eagle_moe.experts import ExpertSpec, build_expert
from train.weights import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200)}
SIDES = {"left": 4, "right": 28}
COUNT = 12
RECORDS = "records.jsonl"


class Toys:
    """Random weights and a few records under `folder`, the same for the same `seed`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed

    def expert(self, spec: ExpertSpec) -> Path:
        """Folder of an expert of ours with random weights."""

        def write(folder: Path) -> None:
            save_expert(folder, spec, build_expert(spec).state_dict())

        return self._made(f"expert-{spec.name}", spec.dump(), write)

    def language_model(self, fields: Mapping[str, Any], special: Sequence[str]) -> Path:
        """Folder of a causal LM with random weights and its tokenizer, as they are published.

        `fields`: its config with `model_type`; the tokenizer decides about the vocabulary.
        `special`: tokens that its chat template writes.
        """

        def write(folder: Path) -> None:
            tokenizer = write_tokenizer(folder, special)
            decided = {
                "vocab_size": len(tokenizer),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            }
            given = {key: value for key, value in fields.items() if key != "model_type"}
            config = CONFIG_MAPPING[fields["model_type"]](**{**given, **decided})
            with quiet_transformers():
                AutoModelForCausalLM.from_config(config).save_pretrained(folder)

        return self._made("language_model", [dict(fields), list(special)], write)

    def data(self, name: str, captions: bool) -> Path:
        """A file of records with their pictures beside it."""
        kind = "captions" if captions else "conversations"
        return self._made(name, kind, lambda folder: write_records(folder, captions)) / RECORDS

    def _made(self, name: str, told: Any, write: Callable[[Path], None]) -> Path:
        text = json.dumps([told, self.seed], sort_keys=True)
        folder = self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if folder.is_dir():
            return folder
        draft = folder.with_name(f".{folder.name}.{os.environ.get('RANK', '0')}.writing")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            write(draft)
        try:
            draft.rename(folder)
        except OSError:
            shutil.rmtree(draft)
            if not folder.is_dir():
                raise
        return folder


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


def write_records(folder: Path, captions: bool) -> None:
    """Twelve records in LLaVA style and their pictures: coloured squares to the left or right.

    `captions`: one description each. Otherwise conversations of two rounds; one has two pictures,
    one none.
    """
    records = []
    for index in range(COUNT):
        colour, side = list(COLOURS)[index % 3], list(SIDES)[index % 2]
        picture = f"{index}.png"
        _draw(COLOURS[colour], SIDES[side]).save(folder / picture)
        records.append(_record(index, picture, colour, side, captions))
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / RECORDS).write_text(text, encoding="utf-8")


def _draw(colour: tuple[int, int, int], left: int) -> Image.Image:
    picture = Image.new("RGB", (48, 32), (250, 250, 250))
    ImageDraw.Draw(picture).rectangle((left, 8, left + 16, 24), fill=colour)
    return picture


def _record(index: int, picture: str, colour: str, side: str, captions: bool) -> dict[str, Any]:
    if captions:
        said = [("human", "<image>\nDescribe it."), ("gpt", f"A {colour} square on the {side}.")]
        return {"id": str(index), "image": picture, "conversations": _turns(said)}
    question, pictures = "<image>\nWhich colour?", [picture]
    if index == 1:
        question, pictures = "<image>\n<image>\nWhich colour have both?", [picture, picture]
    if index == 2:
        question, pictures = "Which colour is the sky?", []
    turns = [("human", question), ("gpt", colour), ("human", "On which side?"), ("gpt", side)]
    record = {"id": str(index), "skill": side, "conversations": _turns(turns)}
    return {**record, "image": pictures} if pictures else record


def _turns(said: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in said]
