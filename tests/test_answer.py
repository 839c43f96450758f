"""eval/answer.py: what is kept of answers, while a run lasts and when it is finished."""

from __future__ import annotations

import pytest

from eval.answer import ITEMS, Answer, KeptTexts, read_answers, write_answers


def make_answer(index: int, prediction: str = "lamp") -> Answer:
    return Answer(str(index), "text", "q", ["lamp", "a lamp"], prediction, {"anls": 1.0}, {"n": 3})


def test_what_is_written_is_read_and_equal_answers_are_equal_files(tmp_path):
    answers = [make_answer(0, "straße"), make_answer(1, "one\u2028line\n"), make_answer(2, "")]
    write_answers(tmp_path, answers)
    assert read_answers(tmp_path) == answers
    first = (tmp_path / ITEMS).read_bytes()
    write_answers(tmp_path, answers)
    assert (tmp_path / ITEMS).read_bytes() == first


def test_texts_outlive_the_process(tmp_path):
    texts = KeptTexts(tmp_path / "new" / "texts")
    texts["a"] = "straße\u2028\n"
    texts.setdefault("a", "other")
    texts.setdefault("b", "")
    again = KeptTexts(tmp_path / "new" / "texts")
    assert dict(again) == dict(texts) == {"a": "straße\u2028\n", "b": ""}


def test_a_line_torn_by_a_kill_is_as_if_it_had_never_been(tmp_path):
    texts = KeptTexts(tmp_path / "texts")
    texts["a"], texts["b"] = "one", "two"
    whole = texts.path.read_bytes()
    for cut in range(1, len(b'["b", "two"]\n') + 1):
        texts.path.write_bytes(whole[:-cut])
        again = KeptTexts(texts.path)
        assert dict(again) == {"a": "one"}
        again["b"] = "two"
        assert texts.path.read_bytes() == whole


def test_a_file_of_something_else_is_named(tmp_path):
    (tmp_path / "texts").write_text('["a", "one"]\n{"id": 1}\n')
    with pytest.raises(ValueError, match=r"texts:2: not an answer"):
        KeptTexts(tmp_path / "texts")
