"""Searches whose truth is known: the worlds are what they say, and the rules compare as told."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from train.search.contest import (
    AWARE,
    DEFAULT,
    FIXED,
    PLAIN,
    Outcome,
    Way,
    claims,
    column,
    experiment,
    make_world,
    overall,
    play,
)
from train.search.noise import claim_table, draw, level_table, mean_of, outcome_table
from train.search.rules import NoiseAware, Plain
from train.search.scores import score_of
from train.search.trial import Trial
from train.search.truths import BASE, FAMILIES, POINT, Truth, World

SMALL = {PLAIN: FIXED[PLAIN], DEFAULT: FIXED[DEFAULT]}


@pytest.fixture(scope="module")
def found():
    return experiment(8, SMALL, first=700)


def test_scores_are_around_their_truth_and_runs_differ_as_told():
    world = World(Truth((3.0, 0.0)), seed=0, tasks=3, items=4000, run_noise=0.6)
    members = (BASE, "e0")
    assert world.true_score(members) - world.true_score((BASE,)) == pytest.approx(3 * POINT)
    scores = [score_of(r) for r in world([Trial(members, seed) for seed in range(60)])]
    assert np.mean(scores) == pytest.approx(world.true_score(members), abs=0.012)
    flips = np.sqrt(0.1 / 12000)
    assert np.std(scores) == pytest.approx(np.hypot(0.6 * POINT, flips), rel=0.3)


def test_mixtures_find_the_same_questions_hard():
    world = World(Truth((0.0, 0.0)), seed=1, tasks=2, items=2000, run_noise=0.0)
    first, other = world([Trial((BASE,)), Trial((BASE, "e0"))])
    alike = np.mean([np.mean(first.items[t] == other.items[t]) for t in first.items])
    assert 0.75 < alike < 0.9


def test_what_is_best_counts_experts_that_add_nothing_out():
    world = World(Truth((2.0, 0.0, -1.0, 1.5), 0.0, {3: 0}), 0, 2, 10, 0.0)
    assert world.best() == [(BASE, "e0")]
    assert world.helps((BASE,)) and not world.helps((BASE, "e0"))
    assert world.helps((BASE, "e3")), "the better of the doubles"
    nothing = World(Truth((0.0, 0.0)), 0, 2, 10, 0.0)
    assert nothing.best() == [(BASE,)] and not nothing.helps((BASE,))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_what_their_names_say(family):
    world = make_world(family, 3)
    assert make_world(family, 3).truth == world.truth and 4 <= len(world.names) <= 6
    alone = [world.true_score((BASE, name)) - world.true_score((BASE,)) for name in world.names]
    signs = {"useless": [0, 0], "harmful": [-1, -1], "redundant": [1, 1], "small": [1, 1]}
    if family in signs:
        assert np.sign(np.round([min(alone), max(alone)], 9)).tolist() == signs[family]


def test_a_wrong_stop_is_too_early_or_too_late():
    world = World(Truth((9.0, -9.0)), 0, 3, 1500, 0.0)
    right = play(world, {PLAIN: Way(Plain())})[PLAIN]
    assert right == Outcome(True, False, False, False, 0.0, 1, 4)
    pushed = World(Truth((0.0,) * 6), 2, 2, 200, 0.6)  # nothing helps, but luck says so
    outcome = play(pushed, {PLAIN: Way(Plain())})[PLAIN]
    assert outcome.late and not outcome.early and outcome.wrong_stop and not outcome.right


def test_the_noise_aware_rule_is_right_more_often_on_the_same_scores(found):
    plain, aware = overall(found)[PLAIN], overall(found)[DEFAULT]
    lead, half = mean_of(column(aware, "right") - column(plain, "right"))
    assert lead - half > 0
    fewer, half = mean_of(column(plain, "wrong_stop") - column(aware, "wrong_stop"))
    assert fewer - half > 0
    loss, half = mean_of(column(aware, "loss") - column(plain, "loss"))
    assert loss - half < 0.05, "and not by giving away score"
    extra = column(aware, "trials").mean() / column(plain, "trials").mean()
    assert extra == pytest.approx(1, abs=0.03), "at equal cost"


def test_in_no_family_it_is_clearly_less_often_right(found):
    for family, values in found.items():
        lead, half = mean_of(column(values[DEFAULT], "right") - column(values[PLAIN], "right"))
        assert lead + half >= 0, family


def test_bought_seeds_go_further_than_seeds_for_all():
    ways = {PLAIN: Way(Plain(), (0, 1)), AWARE: Way(NoiseAware(), (0, 1, 2, 3))}
    outcomes = overall(experiment(2, ways, first=900))
    trials = {way: column(values, "trials").mean() for way, values in outcomes.items()}
    right = {way: column(values, "right").mean() for way, values in outcomes.items()}
    assert trials[AWARE] < 1.1 * trials[PLAIN] and right[AWARE] > right[PLAIN]


def test_what_is_claimed_is_mostly_so():
    claimed = claims(6, first=800)
    sure = claimed[claimed[:, 0] > 0.9]
    assert len(sure) > 50 and sure[:, 1].mean() > 0.9
    unsure = claimed[claimed[:, 0] < 0.6]
    assert unsure[:, 1].mean() < 0.7
    assert claim_table(claimed).row_count == 10


def test_tables_and_picture(tmp_path):
    rng = np.random.default_rng(0)
    found = {f: {way: rng.random((5, len(fields(Outcome)))) for way in FIXED} for f in FAMILIES}
    assert outcome_table("x", found, (PLAIN, DEFAULT)).row_count == len(FAMILIES) + 1
    assert level_table(found).row_count == len(FIXED)
    draw(found, tmp_path / "docs" / "noise.png")
    assert (tmp_path / "docs" / "noise.png").read_bytes().startswith(b"\x89PNG")
