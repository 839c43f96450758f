"""A sample as the model is taught it: the prompt with its supervised tokens marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.text import Text

from train.data.labels import IGNORE_INDEX, Encoded, Encoder
from train.data.records import Record


def show_sample(record: Record, encoder: Encoder, colour: bool) -> Text:
    """Heading and marked prompt of one record.

    Supervised tokens are green on a terminal (`colour`), between `[[` and `]]` elsewhere; a run of
    image tokens is shown as its number. Raises `ValueError` if the record cannot be encoded.
    """
    encoded = encoder(record)
    heading = (
        f"{record.id}: tokens {len(encoded.input_ids)}, supervised {encoded.supervised}, "
        f"images {len(record.images)}"
    )
    if encoded.cut:
        heading += f", cut off {encoded.length - len(encoded.input_ids)}"
    shown = Text(heading + "\n", style="bold")
    for kind, text in _runs(encoded, encoder):
        if kind == "image":
            shown.append(text, style="cyan not bold")
        elif kind == "supervised":
            shown.append(text if colour else f"[[{text}]]", style="green not bold")
        else:
            shown.append(text, style="not bold dim")
    return shown


def _runs(encoded: Encoded, encoder: Encoder) -> Iterator[tuple[str, str]]:
    """Neighbouring tokens of one kind (`image`, `supervised`, `ignored`) and their text."""

    def kind_of(at: int) -> str:
        if encoded.input_ids[at] == encoder.image_token_id:
            return "image"
        return "ignored" if encoded.labels[at] == IGNORE_INDEX else "supervised"

    for kind, group in groupby(range(len(encoded.input_ids)), kind_of):
        ids = encoded.input_ids[list(group)]
        if kind == "image":
            yield kind, f"<image> x {len(ids)}"
        else:
            yield kind, encoder.tokenizer.decode(ids)
