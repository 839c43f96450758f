"""The mini tokenizer: known words are tokens, everything else is spelled.

Characters are what reading needs; words keep questions short. Built from fixed lists, so it is
the same on every machine, and any text can be encoded and decoded without loss.
"""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import TYPE_CHECKING

from eval.skills.scene import COLOURS, SHAPES, SYMBOLS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
IMAGE_TOKEN = "<image>"
WORDS = (
    *COLOURS,
    *SHAPES,
    *"what is the text of value how high bar which highest lowest many shapes where color".split(),
    *"shape word left right top bottom center transcribe chart form written".split(),
    "USER:",
    "ASSISTANT:",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer with `<image>` as one special token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL.values(), IMAGE_TOKEN, *string.printable.rstrip("\r\x0b\x0c")]
    pieces += [symbol for symbol in SYMBOLS if len(symbol) > 1]
    pieces += [prefix + word for word in WORDS for prefix in ("", " ")]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    model = models.WordLevel(vocab, unk_token=SPECIAL["unk_token"])
    tokenizer = Tokenizer(model)
    symbols = "|".join(re.escape(s) for s in SYMBOLS if len(s) > 1)
    words = "|".join(map(re.escape, WORDS))
    # A word stands alone: next to letters, digits or transcript cells it is spelling
    word = f"(?:{words})(?![a-z0-9.\\[])"
    pattern = f"{symbols}| {word}|(?<![a-z0-9.\\]]){word}|[\\s\\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def write_tokenizer(out: str | Path) -> Path:
    """Save the mini tokenizer as a folder that `AutoTokenizer` loads."""
    build_tokenizer().save_pretrained(out)
    return Path(out)
