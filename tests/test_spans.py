"""Spans: where records lie, found in pieces of any size, is what a JSON parser finds."""

import json
import random

import pytest

from train.data.spans import array_spans, line_spans

HARD = [
    {"id": 0, "text": 'quotes " and \\ and \\" and \\\\" at the end \\'},
    {"id": 1, "text": "brackets ]}[{,", "list": [1, [2, {"a": "]"}], "}"]},
    {"id": 2, "text": "non-ASCII: é 漢字 😀 \u2028 \t \n"},
    {},
    [],
    "a text, with commas",
    None,
    -1.5e-3,
]


def pieces(data, size):
    return [data[at : at + size] for at in range(0, len(data), size)]


def read(spans, data):
    return [json.loads(data[start : start + length]) for start, length in spans.tolist()]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize(
    "form",
    [
        {"ensure_ascii": True},
        {"ensure_ascii": False},
        {"indent": 2},
        {"separators": (",", ":")},
    ],
)
def test_elements_of_an_array(size, form):
    data = json.dumps(HARD, **form).encode()
    assert read(array_spans(pieces(data, size), "x"), data) == HARD
    framed = b"\xef\xbb\xbf \n" + data + b"\n\n "
    assert read(array_spans(pieces(framed, size), "x"), framed) == HARD


@pytest.mark.parametrize("size", [1, 2, 5, 10_000])
@pytest.mark.parametrize("end", ["\n", "", "\r\n", "\n\n  \n"])
def test_lines(size, end):
    lines = [json.dumps(item, ensure_ascii=False) for item in HARD]
    data = ("\n \n" + "\r\n".join(lines[:4]) + "\n\n" + "\n".join(lines[4:]) + end).encode()
    assert read(line_spans(pieces(data, size)), data) == HARD


def test_random_texts_in_random_pieces():
    rng = random.Random(0)
    alphabet = '\\"[]{},: \nab\u00e9'
    for _ in range(200):
        values = ["".join(rng.choices(alphabet, k=rng.randrange(12))) for _ in range(5)]
        data = json.dumps([values, {"k": values}, values[0]], ensure_ascii=False).encode()
        spans = array_spans(pieces(data, rng.randrange(1, 9)), "x")
        assert read(spans, data) == [values, {"k": values}, values[0]]


def test_nothing_in_it():
    assert len(line_spans([b"", b"\n \n"])) == len(line_spans([])) == 0
    for data in (b"", b"  \n"):
        with pytest.raises(ValueError, match="x: the file holds no record"):
            array_spans([data], "x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"a": 1}, {"b": 2', "ends in the middle of record 1. It is incomplete"),
        (b'[{"a": 1}, {"b": "2]', "ends in the middle of record 1"),
        (b'[{"a": 1}', "ends in the middle of record 0"),
        (b'[{"a": 1}] [', r"more after the list. Name it \.jsonl"),
        (b'{"a": 1}\n{"a": 2}\n', r"expected a list of records, got an object. Name it \.jsonl"),
        (b'{"a": [1, 2]}', "expected a list of records, got an object"),
        (b"<html>", "begins with b'<', not with"),
        (b'"[]"', "not with"),
    ],
)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_broken_arrays_are_named(data, message, size):
    with pytest.raises(ValueError, match=message) as error:
        array_spans(pieces(data, size), "data.json")
    assert str(error.value).startswith("data.json: ")
