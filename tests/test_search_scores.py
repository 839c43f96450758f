"""Scores and their noise: means that count tasks once, intervals that mean what they say."""

from __future__ import annotations

import time

import numpy as np
import pytest

from train.search.rounds import Interval
from train.search.scores import Evidence, Measured, score_of, verdict_of
from train.search.trial import Cost, Result, Trial

A, B = ("a",), ("a", "b")


def measured(members, *runs, cost=None):
    """Runs: task -> items, or a score."""
    results = []
    for seed, run in enumerate(runs):
        trial = Trial(members, seed)
        known = {"items": run} if isinstance(run, dict) else {"score": run}
        results.append(Result(trial, **known, cost=cost or Cost()))
    return Measured(members, tuple(results))


def evidence(*each, **options):
    return Evidence({one.members: one for one in each}, **options)


def test_every_task_counts_once():
    run = {"many": [1.0] * 9 + [0.0], "two": [0.0, 1.0]}
    assert score_of(Result(Trial(A), items=run)) == pytest.approx((0.9 + 0.5) / 2)
    found = evidence(measured(A, run))
    assert found.score(A) == pytest.approx(0.7)
    assert found.without("two").score(A) == pytest.approx(0.9)
    assert sum(map(sum, run.values())) / 12 != pytest.approx(0.7), "a mean over all items differs"


def test_the_interval_of_a_gain_is_that_of_its_sampling_distribution():
    rng = np.random.default_rng(0)
    sizes = {"x": 400, "y": 1500}
    first = {task: (rng.random(n) < 0.5).astype(float) for task, n in sizes.items()}
    other = {  # changes its mind about a tenth
        task: np.where(rng.random(n) < 0.1, rng.random(n) < 0.7, first[task]).astype(float)
        for task, n in sizes.items()
    }
    gain = evidence(measured(A, first), measured(B, other)).gain(B, A)
    variance = sum(np.var(other[t] - first[t]) / n for t, n in sizes.items()) / 4
    width = 2 * 1.96 * np.sqrt(variance)
    assert gain.high - gain.low == pytest.approx(width, rel=0.04)
    assert gain.low < gain.mean < gain.high
    unpaired = sum((np.var(other[t]) + np.var(first[t])) / n for t, n in sizes.items()) / 4
    assert 2 * 1.96 * np.sqrt(unpaired) > 2 * width, "two separate intervals are far too wide"


def test_no_interval_of_shares_leaves_0_to_1():
    rng = np.random.default_rng(3)
    runs = [{"x": (rng.random(50) < share).astype(float)} for share in (0.02, 0.4)]
    found = evidence(measured(A, *runs), measured(B, *runs[::-1])).interval(A)
    assert (found.low, found.high) == (0.0, 1.0), "two runs so far apart say next to nothing"
    points = [{"x": 100 * run["x"]} for run in runs]
    found = evidence(measured(A, *points), measured(B, *points[::-1])).interval(A)
    assert found.low < 0 and found.high > 100, "points of a benchmark know no such bounds"


def test_the_formula_and_the_resampling_agree_on_the_noise():
    rng = np.random.default_rng(1)
    runs = [{"x": rng.random(300), "y": rng.random(80)} for _ in range(6)]
    found = evidence(measured(A, *runs[:3]), measured(B, *runs[3:5]), measured(("c",), runs[5]))
    drawn = np.cov(found.noise.T)
    # few runs: the draws have longer tails than the formula, and only on the diagonal
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(found.covariance[off], drawn[off], atol=0.04 * drawn.max())
    assert np.all(np.diag(drawn) > 0.95 * np.diag(found.covariance))


def test_runs_that_move_as_a_whole_widen_the_interval_and_flips_are_not_counted_twice():
    rng = np.random.default_rng(2)
    shares = rng.random(2000)

    def run(lift):
        return {"x": (rng.random(2000) < shares + lift).astype(float)}

    steady = evidence(measured(A, *(run(0.0) for _ in range(8))))
    moved = evidence(measured(A, *(run(lift) for lift in rng.normal(0, 0.05, 8))))
    assert width(moved.interval(A)) > 2 * width(steady.interval(A))
    flips = np.var([score_of(r) for r in steady.measured[A].results]) / 8
    total = np.var(np.mean([r.items["x"] for r in steady.measured[A].results], axis=0)) / 2000
    assert steady.covariance[0, 0] == pytest.approx(total, rel=0.3)
    assert flips < total, "the resampling of items holds the flips already"


def width(interval: Interval) -> float:
    return interval.high - interval.low


def test_with_two_runs_the_spread_is_pooled_over_mixtures_and_is_itself_uncertain():
    rng = np.random.default_rng(3)
    several = [measured((str(i),), *rng.normal(50, 1, 2)) for i in range(30)]
    alone = measured(A, 50.0)
    known = width(evidence(alone, *several).interval(A))
    assert known == pytest.approx(2 * 1.96, rel=0.25)
    pair = measured(B, 49.3, 50.7)  # a spread of 1, from one difference
    assert width(evidence(alone, pair).interval(A)) > 3 * known


def test_what_nothing_is_known_of_has_no_interval():
    found = evidence(measured(A, 681.5), measured(B, 690.7))
    assert found.noise_of == () and found.noise is None
    assert found.gain(B, A) == Interval(pytest.approx(9.2))
    assert verdict_of(found.gain(B, A)) is None
    single = evidence(measured(A, {"gqa": [64.9], "pope": [88.0]}))
    assert single.noise_of == (), "one number per task is a score, not a sample"
    assert evidence(measured(A, {"x": [0, 1]})).noise_of == ("items",)
    assert evidence(measured(A, 1.0, 2.0)).noise_of == ("seeds",)


def test_verdicts():
    assert verdict_of(Interval(2, 1, 3)) == "better"
    assert verdict_of(Interval(-2, -3, -1)) == "worse"
    assert verdict_of(Interval(1, 0, 2)) == "not distinguishable"


def test_one_right_answer_more_is_not_better():
    first, other = {"x": [0.0] * 20}, {"x": [0.0] * 19 + [1.0]}
    gain = evidence(measured(A, first), measured(B, other)).gain(B, A)
    assert verdict_of(gain) == "not distinguishable"


def test_the_same_results_give_the_same_numbers():
    rng = np.random.default_rng(4)
    runs = [{"x": rng.random(50)} for _ in range(3)]
    pair = measured(A, *runs[:2]), measured(B, runs[2])
    assert evidence(*pair).gain(B, A) == evidence(*pair).gain(B, A)


def test_ten_thousand_resamples_of_a_round_take_less_than_a_second_or_two():
    rng = np.random.default_rng(5)
    mixtures = [
        measured((str(i),), {f"task{t}": (rng.random(1000) < 0.6).astype(float) for t in range(5)})
        for i in range(10)
    ]
    started = time.process_time()
    assert evidence(*mixtures).noise.shape == (10_000, 10)
    assert time.process_time() - started < 2.5  # 0.6 s on a core that others share
