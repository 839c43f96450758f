"""Records: both styles give the same conversation; every mistake is named with its remedy."""

import json
import pickle

import pytest

from train.data.records import parse_record
from train.data.source import RecordSource

IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def llava(*turns, **fields):
    roles = ("human", "gpt")
    return {
        "id": "a",
        **fields,
        "conversations": [
            {"from": roles[number % 2], "value": value} for number, value in enumerate(turns)
        ],
    }


def parse(raw, **options):
    return parse_record(raw, 3, "train.json", **options)


def test_both_styles_give_the_same_conversation():
    turns = ["<image>\nwhat is this", "a cat", "and this: <image>", "a dog"]
    images = ["cat.png", "dog.png"]
    roles = ("user", "assistant")
    listed = {
        "id": "a",
        "images": images,
        "messages": [
            {"role": roles[number % 2], "content": value} for number, value in enumerate(turns)
        ],
    }
    typed = {
        "id": "a",
        "messages": [
            {
                "role": "user",
                "content": [{**IMAGE, "path": "cat.png"}, text("what is this")],
            },
            {"role": "assistant", "content": [text("a cat")]},
            {
                "role": "user",
                "content": [text("and this: "), {**IMAGE, "path": "dog.png"}],
            },
            {"role": "assistant", "content": "a dog"},
        ],
    }
    first = parse(llava(*turns, image=images))
    assert first == parse(listed) == parse(typed)
    assert first.images == ("cat.png", "dog.png")
    assert first.messages[0] == {"role": "user", "content": [IMAGE, text("what is this")]}
    assert first.messages[2] == {"role": "user", "content": [text("and this: "), IMAGE]}
    assert first.text("assistant") == ["a cat", "a dog"]


def test_placeholders_keep_their_place_and_give_up_one_line_break():
    record = parse(llava("A:\n<image>\n<image>\n\nB<image>", "yes", image=["1", "2", "3"]))
    assert record.messages[0]["content"] == [text("A:\n"), IMAGE, IMAGE, text("\nB"), IMAGE]


def test_extra_fields_and_missing_id():
    record = parse({**llava("q", "a"), "skill": "ocr", "image": None})
    assert record.extra == {"skill": "ocr"}
    assert record.images == ()
    raw = llava("q", "a")
    del raw["id"]
    assert parse(raw).id == "3"


def test_without_images_is_the_same_text():
    record = parse(llava("<image>\nwhat", "cat", image="cat.png")).without_images()
    assert record.images == ()
    assert record.messages[0]["content"] == [text("what")]


@pytest.mark.parametrize(("placeholders", "images"), [(1, 2), (2, 1), (1, 0), (0, 1), (0, 2)])
def test_count_mismatch_names_the_sample_and_both_numbers(placeholders, images):
    raw = llava("<image>\n" * placeholders + "q", "a", image=["x.png"] * images)
    with pytest.raises(ValueError, match=r'train\.json: record 3 \(id "a"\)') as error:
        parse(raw)
    assert f"{placeholders} <image> in the text but {images} images" in str(error.value)


def test_missing_placeholder_can_be_prepended_but_a_wrong_count_cannot():
    record = parse(llava("q", "a", image=["x", "y"]), missing_placeholder="prepend")
    assert record.messages[0]["content"] == [IMAGE, IMAGE, text("q")]
    with pytest.raises(ValueError, match="1 <image> in the text but 2 images"):
        parse(llava("<image>q", "a", image=["x", "y"]), missing_placeholder="prepend")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "expected an object, got list"),
        ({"id": 1, "text": "x"}, "give `conversations` or `messages`.*found only id, text"),
        ({**llava("q"), "messages": []}, "found conversations and messages"),
        ({"conversations": []}, "`conversations` must be a list with at least one turn"),
        ({"conversations": "hi"}, "`conversations` must be a list"),
        ({"conversations": [{"value": "q"}]}, r"`conversations\[0\]` must be an object with"),
        (
            {"conversations": [{"from": "humen", "value": "q"}]},
            r'`conversations\[0\]\.from` = \'humen\'\. Did you mean "human"',
        ),
        (
            {"conversations": [{"from": "human", "value": 3}]},
            r"`conversations\[0\]\.value` must be text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "is no content item"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]},
            "not downloaded",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": 1}]}]},
            "`path` of an image item",
        ),
        (llava("<image>", "a", image=""), "leave it out for a text-only record"),
        (llava("<image>", "a", image=[""]), "leave it out for a text-only record"),
        (llava("<image>", "a", image={"path": "x"}), "must be a file name or a list"),
        (llava("<image>", "a", image="x", images=["x"]), "give `image` or `images`, not both"),
        (
            {
                "images": ["x"],
                "messages": [{"role": "user", "content": [{"type": "image", "path": "x"}]}],
            },
            "both in a list and inside `content`",
        ),
    ],
)
def test_schema_errors(raw, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(raw)
    assert "train.json: record 3" in str(error.value)


def test_json_and_jsonl_read_alike(tmp_path):
    raws = [llava(f"question {n} é", "answer", skill=n) for n in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(raws), encoding="utf-8")
    lines = [json.dumps(raw, ensure_ascii=False) for raw in raws]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    whole, lazy = RecordSource(tmp_path / "a.json"), RecordSource(tmp_path / "a.jsonl")
    assert len(whole) == len(lazy) == 5
    strip = [(record.id, record.messages, record.extra) for record in whole]
    assert strip == [(record.id, record.messages, record.extra) for record in lazy]
    # what a data loader's worker gets
    assert pickle.loads(pickle.dumps(lazy))[4] == lazy[4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"id": 1}\n{"id": 2}', r"a\.json: expected a list .* Name it \.jsonl"),
        ("a.json", '{"id": 1}', "expected a list of records, got an object"),
        ("a.json", "[]", "holds no record"),
        ("a.jsonl", "", "holds no record"),
        ("a.txt", "[]", r"name the file \.jsonl"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        RecordSource(tmp_path / name)


def test_a_broken_line_is_named(tmp_path):
    good = json.dumps(llava("q", "a"))
    (tmp_path / "a.jsonl").write_text(f"{good}\n{good[:-5]}\n", encoding="utf-8")
    records = RecordSource(tmp_path / "a.jsonl")
    assert records[0].id == "a"
    with pytest.raises(ValueError, match=r"a\.jsonl: record 1: not valid JSON"):
        records[1]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        RecordSource(tmp_path / "nothing.json")
