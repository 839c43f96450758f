"""eval/kept.py: texts that a run has finished outlive it."""

from __future__ import annotations

import pytest

from eval.kept import KeptTexts


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
