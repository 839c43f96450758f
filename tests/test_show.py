"""Show: what is marked is what is learned, in colour or without."""

import pytest

from train.data.labels import IGNORE_INDEX, Encoder
from train.data.records import parse_record
from train.data.show import show_sample


@pytest.fixture
def record():
    turns = [
        ("human", "<image>\n<image>what [now]"),
        ("gpt", "a cat"),
        ("human", "?"),
        ("gpt", "no"),
    ]
    raw = {
        "id": "x",
        "image": ["a.png", "b.png"],
        "conversations": [{"from": role, "value": value} for role, value in turns],
    }
    return parse_record(raw, 0, "data.json")


def test_plain_text(record, tiny_processor):
    encoder = Encoder(tiny_processor, None)
    shown = show_sample(record, encoder, colour=False).plain
    tokens = encoder(record).length
    assert shown == (
        f"x: tokens {tokens}, supervised 11, images 2\n"
        "<s>USER: <image> x 16\n<image> x 16\nwhat [now] "
        "ASSISTANT:[[ a cat</s>]]USER: ? ASSISTANT:[[ no</s>]]"
    )


def test_colours_mark_the_same_tokens(record, tiny_processor):
    encoder = Encoder(tiny_processor, None)
    shown = show_sample(record, encoder, colour=True)
    green = [
        shown.plain[span.start : span.end] for span in shown.spans if "green" in str(span.style)
    ]
    labels = encoder(record).labels
    assert "".join(green) == tiny_processor.tokenizer.decode(labels[labels != IGNORE_INDEX])
    assert green == [" a cat</s>", " no</s>"]


def test_what_is_cut_off_is_said(record, tiny_processor):
    encoder = Encoder(tiny_processor, 70)
    lost = Encoder(tiny_processor, None)(record).length - 70
    shown = show_sample(record, encoder, colour=False).plain
    heading = f"x: tokens 70, supervised 7, images 2, cut off {lost}"
    assert shown.splitlines()[0] == heading
