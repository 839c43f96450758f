"""eagle_moe/scores/score.py: exact match, intervals against closed forms, pairs, chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from eagle_moe.scores.score import (
    accuracy_by_skill,
    bootstrap,
    chance_of,
    is_correct,
    paired_difference,
)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("lamp", "lamp", True),
        ("  Lamp\n", "lamp", True),
        ("STRASSE", "straße", True),
        ("lamp.", "lamp", False),
        ("the lamp", "lamp", False),
        ("lam", "lamp", False),
        ("", "lamp", False),
        ("top  left", "top left", False),
        ("07", "7", False),
    ],
)
def test_exact_match_forgives_outer_space_and_case_only(prediction, answer, right):
    assert is_correct(prediction, answer) is right


@pytest.mark.parametrize(("right", "n"), [(500, 1000), (90, 1000), (930, 1000), (60, 250)])
def test_interval_agrees_with_the_binomial_distribution(right, n):
    """The bootstrap of a 0/1 mean is Binomial(n, p)/n exactly, so its quantiles are known."""
    got = bootstrap([1.0] * right + [0.0] * (n - right))
    law = stats.binom(n, right / n)
    assert got.mean == right / n
    assert got.n == n
    assert got.low == pytest.approx(law.ppf(0.025) / n, abs=1.5 / n)
    assert got.high == pytest.approx(law.ppf(0.975) / n, abs=1.5 / n)
    half = 1.96 * math.sqrt(got.mean * (1 - got.mean) / n)
    assert got.high - got.low == pytest.approx(2 * half, rel=0.06)


def test_interval_of_fractions_agrees_with_resampling_one_by_one():
    values = np.random.default_rng(3).choice([0.0, 0.125, 0.25, 1.0], size=300)
    rng = np.random.default_rng(4)
    means = [rng.choice(values, size=len(values)).mean() for _ in range(4000)]
    got = bootstrap(list(values))
    assert got.mean == pytest.approx(values.mean())
    assert (got.low, got.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)


def test_interval_is_the_same_every_time_and_whatever_the_order():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert bootstrap(values) == bootstrap(values) == bootstrap(sorted(values))


@pytest.mark.parametrize("n", [1, 20, 250])
def test_a_count_of_none_or_all_has_the_exact_interval_not_a_width_of_zero(n):
    none, all_right = bootstrap([0.0] * n), bootstrap([1.0] * n)
    exact = stats.binomtest(0, n).proportion_ci(confidence_level=0.95, method="exact")
    assert (none.mean, none.low, none.high) == (0.0, 0.0, pytest.approx(exact.high))
    assert (all_right.high, all_right.low) == (1.0, pytest.approx(1 - exact.high))


@pytest.mark.parametrize("values", [[], [0.0, float("nan")], [0.0, 2.0], [-1.0]])
def test_refuses_no_values_and_impossible_ones(values):
    with pytest.raises(ValueError, match=r"zero questions|not a number between 0 and 1"):
        bootstrap(values)


def test_total_is_the_mean_over_questions_not_over_skills():
    got = accuracy_by_skill(["text", "chart", "chart", "chart"], [0.0, 1.0, 1.0, 1.0])
    assert list(got) == ["total", "text", "chart"]
    assert (got["total"].mean, got["text"].mean, got["chart"].mean) == (0.75, 0.0, 1.0)
    assert [got[key].n for key in got] == [4, 1, 3]


def test_refuses_a_skill_with_the_name_of_the_total():
    with pytest.raises(ValueError, match='a skill is called "total"'):
        accuracy_by_skill(["total"], [1.0])


def test_pairs_give_a_narrower_interval_than_two_separate_ones():
    """400 questions, 40 of which only the first model knows: the rest cancels out."""
    keys = [str(index) for index in range(400)]
    first = {key: index < 240 for index, key in enumerate(keys)}
    second = {key: index < 200 for index, key in enumerate(keys)}
    got = paired_difference(first, second, dict.fromkeys(keys, "text"))["total"]
    assert got.mean == pytest.approx(0.1)
    law = stats.binom(400, 0.1)  # 40 differences of +1, none of -1
    assert got.low == pytest.approx(law.ppf(0.025) / 400, abs=0.004)
    assert got.high == pytest.approx(law.ppf(0.975) / 400, abs=0.004)
    apart = [bootstrap([float(v) for v in side.values()]) for side in (first, second)]
    assert got.high - got.low < sum(one.high - one.low for one in apart) / 2


def test_difference_is_signed_and_per_skill():
    first = {"a": True, "b": False, "c": True, "d": True}
    second = {"d": True, "c": False, "b": True, "a": False}  # another order of the same questions
    got = paired_difference(first, second, {"a": "x", "b": "x", "c": "y", "d": "y"})
    assert got["total"].mean == 0.25
    assert got["x"].mean == 0.0
    assert got["y"].mean == 0.5
    swapped = paired_difference(second, first, {"a": "x", "b": "x", "c": "y", "d": "y"})
    assert swapped["total"].mean == -0.25


def test_no_difference_seen_does_not_mean_none_possible():
    same = {str(index): True for index in range(50)}
    got = paired_difference(same, same, dict.fromkeys(same, "x"))["total"]
    assert got.mean == 0.0
    assert -got.low == got.high == pytest.approx(1 - 0.025 ** (1 / 50))


def test_pairs_need_the_same_questions():
    with pytest.raises(ValueError, match=r"did not answer the same questions: 2 .*\"b\""):
        paired_difference({"a": True, "b": True}, {"a": True, "c": True}, {})


def test_chance_by_hand():
    answers = {"shape": {"circle", "square", "triangle", "cross"}, "word": {"lamp", "tree"}}
    assert chance_of("Circle", "shape", answers) == 0.25
    assert chance_of("tree", "word", answers) == 0.5
    assert chance_of("river", "word", answers) == 0.0
    with pytest.raises(ValueError, match='no training answer to a question of kind "digit"'):
        chance_of("3", "digit", answers)
