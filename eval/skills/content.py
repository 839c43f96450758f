"""What the suite shows: words, tables, numbers and handwritten digits, in three splits.

`pretext` is what experts see in their own tasks, `train` what the mixture learns from, `test` is
held out from both. `pretext` and `train` differ in digits: the mixture learns from few.

Sources: words of the dataset descriptions and stop words of scikit-learn and of Python's own
documentation; table rows and handwritten digits of scikit-learn.
A word or number falls into a split by a hash of itself, so that the split never depends on
which library versions are installed; tables and writers are split by hand.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Literal
from zlib import crc32

import numpy as np

Split = Literal["pretext", "train", "test"]

TEST_SHARE = 0.2
WORD_LENGTHS = (3, 4)
BAR_LEVELS = 7
TRAIN_TABLES = ("iris", "diabetes", "breast_cancer")
TEST_TABLES = ("wine", "linnerud")
"""Tables of scikit-learn; linnerud's exercise table has 20 rows, wine 178."""
FEW_DIGITS = 100
"""The first so many of the file are what the mixture learns from; pretext tasks have 1,438."""


def is_test(content: str) -> bool:
    """Whether a piece of content is held out, by a hash that no random seed changes."""
    return crc32(content.encode()) % 1000 < TEST_SHARE * 1000


@cache
def words(split: Split) -> tuple[str, ...]:
    """Lower-case words of 3 or 4 letters."""
    import pydoc_data.topics

    import sklearn.datasets
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    described = Path(sklearn.datasets.__file__).parent / "descr"
    texts = [path.read_text(encoding="utf-8") for path in sorted(described.glob("*.rst"))]
    texts += [*sorted(ENGLISH_STOP_WORDS), *pydoc_data.topics.topics.values()]
    found = set(re.findall(r"(?<![a-z])[a-z]+(?![a-z])", "\n".join(texts).lower()))
    held_out = split == "test"
    return tuple(sorted(w for w in found if len(w) in WORD_LENGTHS and is_test(w) == held_out))


@cache
def numbers(split: Split) -> tuple[str, ...]:
    """Two-digit numbers."""
    return tuple(n for n in map(str, range(10, 100)) if is_test(n) == (split == "test"))


@cache
def bar_rows(split: Split) -> tuple[tuple[int, ...], ...]:
    """Runs of 3 or 4 neighbouring columns of real table rows, each column scaled to 1..7.

    Held out by table, and by value: no test row equals a training row after rounding.
    """
    rows = {name: _scaled_rows(name) for name in TRAIN_TABLES + TEST_TABLES}
    held_out = split == "test"
    tables = TEST_TABLES if held_out else TRAIN_TABLES
    found = {run for name in tables for row in rows[name] for run in _runs(row)}
    return tuple(sorted(run for run in found if is_test(str(run)) == held_out))


def _scaled_rows(table: str) -> np.ndarray:
    import sklearn.datasets

    data = np.asarray(getattr(sklearn.datasets, f"load_{table}")().data, dtype=float)
    ranks = data.argsort(axis=0).argsort(axis=0) / (len(data) - 1)
    return 1 + np.minimum((ranks * BAR_LEVELS).astype(int), BAR_LEVELS - 1)


def _runs(row: np.ndarray) -> list[tuple[int, ...]]:
    """Neighbouring columns whose largest and smallest value are unique, so questions have one
    answer."""
    runs = [tuple(map(int, row[i : i + n])) for n in (3, 4) for i in range(len(row) - n + 1)]
    return [r for r in runs if r.count(max(r)) == 1 and r.count(min(r)) == 1]


@cache
def digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits: images (n,8,8) float 0..1 and labels (n,).

    The file lists the samples writer after writer, so its last fifth holds other hands.
    """
    import sklearn.datasets

    data = sklearn.datasets.load_digits()
    cut = round(len(data.images) * (1 - TEST_SHARE))
    parts = {"pretext": slice(cut), "train": slice(FEW_DIGITS), "test": slice(cut, None)}
    return data.images[parts[split]] / 16.0, data.target[parts[split]]
