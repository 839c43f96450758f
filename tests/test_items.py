"""eval/items.py: what a suite's files mean, and what is wrong with a bad one."""

from __future__ import annotations

import pytest
from PIL import Image

from eval.items import hash_items, read_items, training_answers
from tests.suites import make_record as record
from tests.suites import make_turns
from tests.suites import write_records as write


def test_reads_what_is_asked(tmp_path):
    (item,) = read_items(write(tmp_path, record("a")))
    assert (item.id, item.skill, item.kind) == ("a", "text", "word")
    assert (item.question, item.answer) == ("what is a", "word a")
    assert item.image == tmp_path / "images" / "a.png"
    assert read_items(tmp_path / "test.jsonl") == [item]


def test_an_item_may_have_no_image(tmp_path):
    turns = make_turns(("what is a", "word a"))
    (item,) = read_items(write(tmp_path, record("a", image=None, conversations=turns)))
    assert item.image is None


def test_a_limit_keeps_all_skills(tmp_path):
    skills = ["text"] * 6 + ["chart"] * 2 + ["form"] * 6
    write(tmp_path, *(record(f"{i:02d}", skill) for i, skill in enumerate(skills)))
    chosen = [item.skill for item in read_items(tmp_path, limit=9)]
    assert {skill: chosen.count(skill) for skill in chosen} == {"text": 4, "chart": 2, "form": 3}
    assert len(read_items(tmp_path, limit=100)) == 14


def test_the_hash_follows_texts_and_pixels(tmp_path):
    before = hash_items(read_items(write(tmp_path, record("a"), record("b"))))
    assert hash_items(read_items(tmp_path)) == before
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "images" / "b.png")
    pixels = hash_items(read_items(tmp_path))
    write(tmp_path, record("a"), record("b", answer="other"))
    assert len({before, pixels, hash_items(read_items(tmp_path))}) == 3


def test_training_answers_are_distinct_normalised_and_by_kind(tmp_path):
    write(
        tmp_path,
        {
            "id": "a",
            "conversations": make_turns(("?", "Red"), ("?", "3")),
            "kinds": ["colour", "count"],
        },
        {
            "id": "b",
            "conversations": make_turns(("?", "red "), ("?", "blue")),
            "kinds": ["colour", "colour"],
        },
        name="train.jsonl",
    )
    assert training_answers(tmp_path) == {"colour": {"red", "blue"}, "count": {"3"}}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"answer": None}, r"test.jsonl:1: `answer` is missing"),
        ({"answer": ""}, r"`answer` is missing or empty"),
        ({"kind": None}, r"`kind` is missing"),
        ({"image": None}, r"are not its one `question`"),
        ({"question": "another"}, r"are not its one `question`"),
        ({"conversations": ["hello"]}, r"must be a list of turns"),
        (
            {"conversations": [{"from": "human", "value": "<image>\nwhat is a"}] * 2},
            r"are not its one `question`",
        ),
    ],
)
def test_bad_records_are_named(tmp_path, changes, complaint):
    write(tmp_path, record("a", **changes))
    with pytest.raises(ValueError, match=complaint):
        read_items(tmp_path)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl: no such file"):
        read_items(tmp_path)
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(ValueError, match="no questions in it"):
        read_items(tmp_path)
    (tmp_path / "test.jsonl").write_text("{]\n")
    with pytest.raises(ValueError, match=r"test\.jsonl:1: not valid JSON"):
        read_items(tmp_path)
    (tmp_path / "test.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match="expected an object, got list"):
        read_items(tmp_path)


def test_bad_suites_are_named(tmp_path):
    write(tmp_path, record("a"), record("a"))
    with pytest.raises(ValueError, match='"a" occurs twice'):
        read_items(tmp_path)
    write(tmp_path, record("a"))
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"its image .*a\.png does not exist"):
        read_items(tmp_path)
    write(tmp_path, record("a"))
    with pytest.raises(ValueError, match="limit = 0"):
        read_items(tmp_path, limit=0)
    write(tmp_path, record("a"), name="train.jsonl")
    with pytest.raises(ValueError, match="1 answers but 0 `kinds`"):
        training_answers(tmp_path)
