"""What is expected of true scores: luck shrinks, what is certain stays, experts are recognised."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from train.search.expected import Expected
from train.search.scores import Evidence, Measured
from train.search.trial import Result, Trial

NAMES = "abcde"


def given(scores: dict[str, float], noise: float, runs: int = 2) -> Evidence:
    """Mixtures in one word, with runs whose mean is the score and whose spread is `noise`."""
    half = noise / np.sqrt(2) * np.array([-1, 1])
    return Evidence(
        {
            tuple(word): Measured(
                tuple(word),
                tuple(Result(Trial(tuple(word), i), score + half[i]) for i in range(runs)),
            )
            for word, score in scores.items()
        },
        resamples=0,
    )


def words(size: int) -> list[str]:
    return ["z" + "".join(more) for n in range(size + 1) for more in combinations(NAMES, n)]


def test_far_above_the_noise_scores_stay_what_they_are():
    rng = np.random.default_rng(0)
    scores = {word: 50 + 10 * rng.standard_normal() for word in words(2)}
    expected = Expected(given(scores, noise=0.01))
    for word, score in scores.items():
        assert expected.score(tuple(word)) == pytest.approx(score, abs=0.02)
    best, second = sorted(scores, key=scores.get)[:-3:-1]
    assert expected.better(tuple(best), tuple(second)) > 0.999


def test_the_best_of_many_that_differ_by_noise_alone_is_not_believed():
    rng = np.random.default_rng(1)
    kept, seen = [], []
    for _ in range(40):
        scores = {"z": 50.0} | {f"z{name}": 50 + rng.standard_normal() for name in NAMES}
        expected = Expected(given(scores, noise=np.sqrt(2)))
        best = tuple(max(scores, key=scores.get))
        seen.append(scores["".join(best)] - 50)
        kept.append(expected.score(best) - expected.score(("z",)))
    assert np.mean(seen) > 0.9, "the winner's curse"
    assert abs(np.mean(kept)) < 0.45 * np.mean(seen)


def test_an_expert_that_helped_in_every_mixture_is_believed_where_it_did_not():
    helps = {word: 50.0 + 1.0 * ("a" in word) for word in words(3)}
    helps["zab"] = 50.0  # one unlucky run
    expected = Expected(given(helps, noise=1.0))
    assert expected.score(("z", "a", "b")) > expected.score(("z", "b")) + 0.2
    alone = {word: helps[word] for word in ("z", "zb", "zab", "zc")}
    few = Expected(given(alone, noise=1.0))
    assert few.better(tuple("zab"), tuple("zb")) < expected.better(tuple("zab"), tuple("zb"))


def test_probabilities_add_up_and_ties_are_even():
    scores = {"z": 50.0, "za": 51.0, "zb": 51.0}
    expected = Expected(given(scores, noise=1.0))
    there, back = (expected.better(tuple(x), tuple(y)) for x, y in (("za", "z"), ("z", "za")))
    assert there + back == pytest.approx(1) and there > 0.5
    assert expected.better(tuple("za"), tuple("zb")) == pytest.approx(0.5, abs=1e-6)


def test_the_scale_of_scores_does_not_matter():
    scores = {"z": 0.50, "za": 0.53, "zb": 0.49, "zab": 0.54}
    small = Expected(given(scores, noise=0.01))
    large = Expected(given({w: 1000 * s for w, s in scores.items()}, noise=10.0))
    pair = tuple("zab"), tuple("za")
    assert small.better(*pair) == pytest.approx(large.better(*pair), abs=1e-6)
    assert 1000 * small.score(pair[0]) == pytest.approx(large.score(pair[0]))


def test_mixtures_without_any_difference():
    expected = Expected(given({"z": 5.0, "za": 5.0}, noise=0.0))
    assert expected.better(tuple("za"), ("z",)) == pytest.approx(0.5, abs=1e-6)
    assert Expected(given({"z": 5.0}, noise=1.0)).score(("z",)) == pytest.approx(5)
