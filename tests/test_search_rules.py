"""Rules: what they pick, when they stop, when they go back, and what they say."""

from __future__ import annotations

import numpy as np
import pytest

from train.search.rules import NoiseAware, Plain, Step, cheapest
from train.search.scores import Evidence, Measured
from train.search.trial import Cost, Result, Trial

BASE, A, B, AB = ("z",), ("z", "a"), ("z", "b"), ("z", "a", "b")
AWARE = NoiseAware()


def given(scores, noise=1.0, cost=None, seed=0):
    """Mixtures with two tasks of questions, whose means are the scores and whose difference from
    another mixture's has about `noise` as one sigma."""
    count, rng = 200, np.random.default_rng(seed)
    measured = {}
    for members, score in scores.items():
        trial, items = Trial(members), {}
        for task in ("x", "y"):
            values = rng.standard_normal(count)
            values -= values.mean()
            items[task] = score + noise * np.sqrt(count) * values / values.std()
        result = Result(trial, items=items, cost=(cost or {}).get(members, Cost()))
        measured[members] = Measured(members, (result,))
    return Evidence(measured, resamples=200)


def test_plain_takes_the_highest_score_and_stops_where_none_is_higher():
    scores = given({BASE: 50.0, A: 50.1, B: 50.2})
    pick = Plain().pick(scores, BASE, [A, B])
    assert pick.chosen == B and "highest score of 2, 50.2: 0.2 above z (50)" in pick.reason
    stop = Plain().pick(given({BASE: 50.0, A: 49.0, B: 50.0}), BASE, [A, B])
    assert stop.chosen is None and stop.reason.startswith("Stop: the highest score of 2, 50 of")
    assert Plain().look_back(scores, [Step(BASE, (A, B)), Step(B, ())]) is None
    assert Plain().pick(scores, (), [A, B]).chosen == B, "without an incumbent it always goes on"


def test_a_clear_gain_is_taken_and_kept():
    scores = given({BASE: 50.0, A: 60.0, B: 50.0, AB: 60.0}, noise=0.5)
    assert AWARE.pick(scores, BASE, [A, B]).chosen == A
    back = AWARE.look_back(scores, [Step(BASE, (A, B)), Step(A, (AB,))])
    assert back.chosen == A and "stays" in back.reason and "99%" in back.reason


def test_a_gain_that_may_be_luck_is_walked_on_but_not_kept():
    scores = given({BASE: 50.0, A: 50.3, B: 49.6, AB: 49.9}, noise=1.0)
    assert AWARE.pick(scores, BASE, [A, B]).chosen == A
    back = AWARE.look_back(scores, [Step(BASE, (A, B)), Step(A, (AB,))])
    assert back.chosen == BASE
    assert "z+a scored 0.3 more than z" in back.reason and "fewest experts" in back.reason


def test_the_level_is_how_sure_one_must_be():
    scores = given({BASE: 50.0, A: 51.5, B: 50.5, AB: 51.0}, noise=1.0)
    steps = [Step(BASE, (A, B)), Step(A, (AB,))]
    assert NoiseAware(level=0.5).look_back(scores, steps).chosen == A
    assert NoiseAware(level=0.99).look_back(scores, steps).chosen == BASE


def test_of_those_that_noise_does_not_part_the_cheaper():
    scores = {BASE: 50.0, A: 55.0, B: 54.9}
    cost = {BASE: Cost(1.0), A: Cost(9.0), B: Cost(2.0)}
    pick = AWARE.pick(given(scores, cost=cost), BASE, [A, B])
    assert pick.chosen == B and "fewest parameters" in pick.reason
    assert "It is 4.9 above z" in pick.reason
    assert AWARE.pick(given(scores), BASE, [A, B]).chosen == A, "costs are not known"
    clear = given({BASE: 50.0, A: 55.0, B: 51.0}, noise=0.5, cost=cost)
    assert AWARE.pick(clear, BASE, [A, B]).chosen == A
    below = given({BASE: 50.0, A: 50.2, B: 49.9}, cost=cost)
    assert AWARE.pick(below, BASE, [A, B]).chosen == A, "the cheaper one is not above the incumbent"


def test_what_is_cheaper():
    def of(cost):
        return cheapest(given({A: 1.0, B: 2.0, AB: 3.0}, cost=cost), [A, B, AB])

    assert of({}) == (B, "the fewest experts"), "of equals the higher score"
    assert of({A: Cost(3, 1), B: Cost(2, 2), AB: Cost(1, 3)}) == (AB, "the fewest parameters")
    assert of({A: Cost(3, 1), B: Cost(None, 2), AB: Cost(1, 3)}) == (A, "the fewest FLOPs")


def test_going_backward_an_expert_goes_unless_that_costs_score():
    scores = given({AB: 50.0, A: 49.9, B: 45.0}, noise=0.7)
    assert Plain().pick(scores, AB, [A, B]).chosen is None
    assert AWARE.pick(scores, AB, [A, B]).chosen == A
    costly = given({AB: 50.0, A: 46.0, B: 45.0}, noise=0.7)
    stop = AWARE.pick(costly, AB, [A, B])
    assert stop.chosen is None and "4 below z+a+b (50)" in stop.reason


def test_further_seeds_go_to_those_in_doubt():
    clear = given({BASE: 50.0, A: 60.0, B: 52.0}, noise=0.3)
    assert AWARE.doubtful(clear, BASE, [A, B]) == [A, B], "nobody has had two runs yet"
    close = given({BASE: 50.0, A: 55.0, B: 55.0}, noise=1.0)
    assert set(AWARE.doubtful(close, BASE, [A, B])) == {A, B}
    runs = {m: (s, s + 0.2) for m, s in ((BASE, 50.0), (A, 55.0), (B, 51.0))}
    known = Evidence(
        {m: Measured(m, tuple(Result(Trial(m, i), s) for i, s in enumerate(runs[m]))) for m in runs}
    )
    assert AWARE.doubtful(known, BASE, [A, B]) == []
    assert Plain().doubtful(close, BASE, [A, B]) == []
    assert AWARE.first((3, 4, 5)) == (3,) and Plain().first((3, 4, 5)) == (3, 4, 5)


def test_without_any_noise_known_the_rule_says_what_to_do():
    known = Evidence({m: Measured(m, (Result(Trial(m), 1.0),)) for m in (BASE, A)})
    with pytest.raises(ValueError, match="two scores per task .* several seeds, or .* rule plain"):
        AWARE.pick(known, BASE, [A])


@pytest.mark.parametrize("options", [{"level": 0.4}, {"level": 1.0}, {"first_seeds": 0}])
def test_settings_out_of_range(options):
    with pytest.raises(
        ValueError, match=f"rule.{next(iter(options))}: {next(iter(options.values()))}"
    ):
        NoiseAware(**options)
