"""Versions of the code: what could change a result counts, what cannot does not."""

from __future__ import annotations

import ast

import pytest

from train.search import keys
from train.search.keys import code_version, digest, meaning_of, source_hashes

CODE = '''
"""A module."""

def double(value: int) -> int:
    """Twice `value`."""
    return 2 * value  # as asked
'''


def meaning(text: str) -> str:
    return meaning_of(ast.parse(text))


def test_words_and_layout_do_not_count():
    plain = "def double(value: int) -> int:\n\n    return (2 *\n        value)\n"
    assert meaning(CODE) == meaning(plain)


@pytest.mark.parametrize(
    ("old", "new"), [("2 * value", "3 * value"), ("value: int", "value: int = 1"), ("d", "t")]
)
def test_what_a_line_does_counts(old, new):
    assert meaning(CODE) != meaning(CODE.replace(old, new, 1) if old != "d" else CODE + "x = 1")


def test_a_text_that_is_used_counts():
    assert meaning("x = 'a'") != meaning("x = 'b'")
    assert meaning("class A:\n    x: int\n    'about x'") == meaning("class A:\n    x: int")


def test_all_that_training_and_scoring_import_is_in_it():
    found = source_hashes()
    for module in (
        "eagle_moe",
        "eagle_moe.model",
        "eagle_moe.experts.sam",
        "train.trainer",
        "train.muon",
        "eval.kept",
        "eagle_moe.scores.score",
        "eagle_moe/templates/short.jinja",
    ):
        assert module in found
    assert not [m for m in found if m.startswith(("train.search", "train.jobs", "train.demo"))]


def test_imports_inside_functions_count(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "run.py").write_text("def f():\n    from train.late import g\n")
    (tmp_path / "train" / "late.py").write_text("g = 1\n")
    monkeypatch.setattr(keys, "ROOT", tmp_path)
    assert set(source_hashes.__wrapped__()) == {"train.run", "train.late"}


def test_versions_of_libraries_count(monkeypatch):
    before = code_version()
    monkeypatch.setattr("eval.identity.library_versions", lambda: {"torch": "0"})
    assert code_version() != before


def test_a_digest_is_of_content_not_of_order():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest([1, 2]) != digest([2, 1])
