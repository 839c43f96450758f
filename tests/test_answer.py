"""eagle_moe/scores/answer.py: answers come back as they were written, or the line is named."""

from __future__ import annotations

from eagle_moe.scores.answer import ITEMS, Answer, read_answers, write_answers


def make_answer(index: int, prediction: str = "lamp") -> Answer:
    return Answer(str(index), "text", "q", ["lamp", "a lamp"], prediction, {"anls": 1.0}, {"n": 3})


def test_what_is_written_is_read_and_equal_answers_are_equal_files(tmp_path):
    answers = [make_answer(0, "straße"), make_answer(1, "one\u2028line\n"), make_answer(2, "")]
    write_answers(tmp_path, answers)
    assert read_answers(tmp_path) == answers
    first = (tmp_path / ITEMS).read_bytes()
    write_answers(tmp_path, answers)
    assert (tmp_path / ITEMS).read_bytes() == first
