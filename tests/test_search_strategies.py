"""The search, on tables: what it tries, in which batches, what it decides, what goes wrong."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest

from tests.paper_search import BASE, FIG_4, POOL
from train.search.board import Board
from train.search.halving import Halving, kendall_tau
from train.search.pool import Pool
from train.search.rules import NoiseAware, Plain
from train.search.strategies import Backward, Exhaustive, Greedy, Random, search
from train.search.trial import ABSENT, Cost, Result, Trial

LETTERS = Pool(tuple("zabcd"), ("z",))
WORTH = {"a": 4.0, "b": 2.0, "c": 1.0, "d": -3.0}


class Table:
    """Runs trials from a function of members, and remembers what was asked together."""

    def __init__(self, score=None, failing=(), items=None):
        self.score = score or (lambda trial: 50 + sum(WORTH.get(m, 0) for m in trial.members))
        self.failing, self.items = failing, items
        self.batches = []

    def __call__(self, trials):
        self.batches.append(list(trials))
        return [self.run(trial) for trial in trials]

    def run(self, trial):
        if "".join(trial.members) in self.failing:
            return Result(trial, error="out of memory, log: runs/x/log")
        if self.items is not None:
            return Result(trial, items=self.items(trial))
        return Result(trial, self.score(trial))

    @property
    def asked(self):
        return ["".join(trial.members) for batch in self.batches for trial in batch]


def noisy(trial, noise=1.0, count=300):
    """Two tasks whose means are the true score, but for luck."""
    rng = np.random.default_rng([trial.seed, *map(ord, "".join(trial.members))])
    score = 50 + sum(WORTH.get(m, 0) for m in trial.members)
    return {task: score + noise * np.sqrt(count) * rng.standard_normal(count) for task in "xy"}


def paper(trials):
    rows = [FIG_4.get(" ".join(trial.members[2:])) for trial in trials]
    return [
        Result(trial, row[0]) if row else Result(trial, error=ABSENT)
        for trial, row in zip(trials, rows, strict=True)
    ]


def test_the_paper_s_search():
    """arXiv 2408.15998, Fig. 4: X2 -> +EVA-02 -> +Pix2Struct -> +SAM, and not DINOv2."""
    choice = search(Pool(POOL, BASE), Greedy(), Plain(), paper)
    added = [
        next(iter(set(r.chosen) - set(r.incumbent.members))) if r.chosen else None
        for r in choice.rounds
    ]
    assert added == ["eva02", "pix2struct", "sam", None]
    assert set(POOL) - set(choice.chosen) == {"dinov2"}
    assert choice.chosen == tuple(name for name in POOL if name in choice.chosen)
    assert [len(r.candidates) for r in choice.rounds] == [4, 3, 2, 1]
    assert choice.rounds[0].candidates[0].gain.mean == pytest.approx(690.4 - 681.5)  # SAM


def test_a_round_is_asked_for_together_and_nothing_twice():
    table = Table()
    choice = search(LETTERS, Greedy(), Plain(), table, seeds=(7, 8))
    assert choice.chosen == tuple("zabc")
    assert [len(batch) for batch in table.batches] == [2 * (1 + 4), 2 * 3, 2 * 2, 2 * 1]
    assert {trial.seed for trial in table.batches[0]} == {7, 8}
    every = [trial for batch in table.batches for trial in batch]
    assert len(every) == len(set(every))


def test_every_round_is_told_as_it_is_decided():
    seen = []
    choice = search(LETTERS, Greedy(), Plain(), Table(), on_round=seen.append)
    assert tuple(seen) == choice.rounds
    last = seen[-1]
    assert last.chosen is None and last.reason.startswith("Stop: the highest score of 1, 54 of")
    assert last.candidates[0].changed == "d" and last.incumbent.score.mean == 57


def test_without_a_base_the_best_single_expert_comes_first():
    pool = Pool(tuple("abcd"))
    choice = search(pool, Greedy(), Plain(), Table())
    assert choice.rounds[0].incumbent is None and choice.rounds[0].chosen == ("a",)
    assert choice.rounds[0].candidates[0].gain is None
    assert choice.chosen == tuple("abc")


def test_backward_takes_away_what_harms_and_never_the_base():
    table = Table()
    choice = search(LETTERS, Backward(), Plain(), table)
    assert choice.rounds[0].incumbent.members == LETTERS.names
    assert choice.chosen == tuple("zabc")
    assert all("z" in members for members in table.asked)
    alone = search(Pool(("a", "d")), Backward(), Plain(), Table())
    assert alone.chosen == ("a",), "at least one expert stays"
    whole = search(Pool(("d", "a"), ("d", "a")), Backward(), Plain(), Table())
    assert whole.chosen == ("a",), "the whole pool as base is where to start from"


def test_exhaustive_tries_every_mixture_with_the_base_or_says_how_many_there_are():
    table = Table()
    assert search(LETTERS, Exhaustive(), Plain(), table).chosen == tuple("zabc")
    expected = {"z" + "".join(c) for n in range(5) for c in combinations("abcd", n)}
    assert set(table.asked) == expected and len(table.asked) == 16
    assert len(table.batches) == 1
    with pytest.raises(ValueError, match="exhaustive: 15 mixtures, more than the 14"):
        search(LETTERS, Exhaustive(most=14), Plain(), Table())


def test_random_draws_different_mixtures_and_the_same_for_a_seed():
    draws = [Table() for _ in range(3)]
    for table, seed in zip(draws, (0, 0, 1), strict=True):
        search(LETTERS, Random(count=6, seed=seed), Plain(), table)
    assert draws[0].asked == draws[1].asked != draws[2].asked
    assert len(set(draws[0].asked)) == 7 and draws[0].asked[0] == "z"
    everything = Table()
    search(LETTERS, Random(count=15), Plain(), everything)
    assert len(set(everything.asked)) == 16
    with pytest.raises(ValueError, match="count 16, but there are only 15"):
        search(LETTERS, Random(count=16), Plain(), Table())


def test_a_failed_candidate_is_marked_and_the_round_goes_on():
    choice = search(LETTERS, Greedy(), Plain(), Table(failing=("za",)))
    first = choice.rounds[0]
    failed = next(one for one in first.candidates if one.changed == "a")
    assert failed.verdict == "failed" and "runs/x/log" in failed.error and failed.score is None
    assert first.chosen == tuple("zb") and "Without a score: 1 of 4." in first.reason
    assert choice.chosen == tuple("zabc"), "it may come in with the next round"


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_a_failure(wrong):
    score = lambda trial: wrong if trial.members == tuple("za") else 50.0  # noqa: E731
    choice = search(LETTERS, Greedy(), Plain(), Table(score))
    failed = choice.rounds[0].candidates[0]
    assert failed.verdict == "failed" and "not a number" in failed.error
    items = lambda trial: {"x": [1.0, wrong if "a" in trial.members else 0.0]}  # noqa: E731
    choice = search(LETTERS, Greedy(), Plain(), Table(items=items))
    assert 'item 1 of task "x"' in choice.rounds[0].candidates[0].error


def test_one_failed_run_of_several_leaves_the_others():
    def run(trials):
        results = Table()(trials)
        return [
            Result(t, error="lost") if (t.members, t.seed) == (tuple("za"), 1) else r
            for t, r in zip(trials, results, strict=True)
        ]

    candidate = search(LETTERS, Greedy(), Plain(), run, seeds=(0, 1)).rounds[0].candidates[0]
    assert candidate.seeds == (0,) and candidate.error == "lost" and candidate.verdict != "failed"


def test_the_search_cannot_start_from_a_mixture_that_fails():
    with pytest.raises(ValueError, match='"z", with which .* has no score: out of memory'):
        search(LETTERS, Greedy(), Plain(), Table(failing=("z",)))
    with pytest.raises(ValueError, match="round 1: no mixture could be scored: out of memory"):
        search(Pool(("a",)), Greedy(), Plain(), Table(failing=("a",)))
    with pytest.raises(ValueError, match="nothing to choose"):
        search(Pool(("a",), ("a",)), Greedy(), Plain(), Table())


def test_a_round_of_which_nothing_is_there_stops_and_says_so():
    all_failed = search(LETTERS, Greedy(), Plain(), Table(failing=("za", "zb", "zc", "zd")))
    assert all_failed.chosen == ("z",)
    assert all_failed.rounds[0].reason == "Stop: none of the 4 candidates could be scored."
    pool = Pool((*POOL, "siglip"), BASE)
    choice = search(pool, Greedy(), Plain(), paper)
    assert choice.rounds[-1].candidates[-1].verdict == ABSENT
    assert choice.rounds[-1].candidates[-1].error == ""


def test_results_that_cannot_be_compared_are_refused():
    short = lambda trial: {"x": [0.0, 1.0], "y": [1.0] * (2 + ("a" in trial.members))}  # noqa: E731
    with pytest.raises(ValueError, match=r'"z\+a" \(seed 0\) has 3 items of task "y", "z" has 2'):
        search(LETTERS, Greedy(), Plain(), Table(items=short))


def test_seeds_are_given_and_different():
    for seeds in ((), (1, 1)):
        with pytest.raises(ValueError, match="seeds"):
            Board(Table(), seeds, 0)


def test_noise_aware_looks_back_in_a_round_of_its_own():
    table = Table(items=lambda trial: noisy(trial, noise=0.5))
    choice = search(LETTERS, Greedy(), NoiseAware(), table, resamples=300)
    last = choice.rounds[-1]
    assert last.reason.startswith("Looking back") and last.chosen == choice.chosen
    assert last.incumbent.members == choice.rounds[-2].incumbent.members
    walked = [r.incumbent.members for r in choice.rounds[:-1]]
    assert [one.members for one in last.candidates] == walked[:-1]
    verdicts = [one.verdict for one in choice.rounds[0].candidates]
    assert verdicts[0] == "better" and verdicts[3] == "worse"
    assert choice.rounds[0].candidates[0].tasks.keys() == {"x", "y"}


def test_noise_aware_tries_what_plain_tries():
    """So it costs no more where every mixture is trained once."""
    tables = Table(items=noisy), Table(items=noisy)
    for table, rule in zip(tables, (Plain(), NoiseAware()), strict=True):
        search(LETTERS, Greedy(), rule, table, resamples=0)
    assert tables[0].asked == tables[1].asked


def test_without_noise_both_rules_choose_the_truth():
    exact = lambda trial: noisy(trial, noise=1e-3)  # noqa: E731
    for strategy in (Greedy(), Backward(), Exhaustive(), Random(count=15)):
        for rule in (Plain(), NoiseAware()):
            choice = search(LETTERS, strategy, rule, Table(items=exact), resamples=0)
            assert choice.chosen == tuple("zabc"), (strategy, rule)


def test_further_seeds_are_bought_for_those_in_doubt_up_to_the_last():
    def close(trial):  # a and b alike, d far below
        luck = 0.5 * (-1) ** (trial.seed + ("a" in trial.members))
        return (
            50 + 5.0 * bool({"a", "b"} & set(trial.members)) - 9.0 * ("d" in trial.members) + luck
        )

    table = Table(close)
    pool = Pool(("z", "a", "b", "d"), ("z",))
    choice = search(pool, Greedy(), NoiseAware(), table, seeds=range(5), resamples=0)
    first = choice.rounds[0]
    runs = {one.changed: len(one.seeds) for one in first.candidates}
    assert runs["a"] > 2 and runs["b"] > 2
    assert runs["d"] == 2, "without items, nobody knows of noise before all have had two"
    assert max(map(len, (one.seeds for one in first.candidates))) <= 5
    assert [trial.seed for trial in table.batches[0]] == [0] * 4
    several = search(
        pool, Greedy(), NoiseAware(first_seeds=5), Table(close), seeds=range(5), resamples=0
    )
    assert {len(one.seeds) for one in several.rounds[0].candidates} == {5}


def test_the_task_that_carries_a_decision_is_named():
    def one_task(trial):
        score = 50.0 + 9.0 * ("a" in trial.members)
        return {"carries": [score, score], "other": [50.0 - ("a" in trial.members)] * 2}

    first = search(LETTERS, Greedy(), Plain(), Table(items=one_task), resamples=10).rounds[0]
    assert first.chosen == tuple("za") and first.hinges_on == ("carries",)
    both = lambda trial: {t: [50.0 + ("a" in trial.members)] * 2 for t in "xy"}  # noqa: E731
    first = search(LETTERS, Greedy(), Plain(), Table(items=both), resamples=10).rounds[0]
    assert first.hinges_on == ()


def test_halving_trains_in_full_only_what_did_well_and_reports_the_agreement():
    def score(trial):
        full = 50 + sum(WORTH.get(m, 0) for m in trial.members)
        return full if trial.budget == 1 else 20 + 10 * trial.budget + full / 10

    table = Table(score)
    halving = Halving(budgets=(0.1, 0.3), keep=0.5)
    choice = search(LETTERS, Greedy(), Plain(), table, halving=halving)
    first = choice.rounds[0]
    assert choice.chosen == tuple("zabc")
    assert [(p.budget, p.candidates, p.kept) for p in first.proxies] == [(0.1, 4, 2), (0.3, 2, 1)]
    assert first.proxies[0].rank_agreement is None, "one full trial has no order"
    dropped = {one.changed: one for one in first.candidates}
    assert dropped["d"].verdict == "dropped" and dropped["d"].proxy == pytest.approx(20 + 1 + 4.7)
    assert dropped["b"].proxy == pytest.approx(20 + 3 + 5.2) and dropped["b"].score is None
    assert {t.budget for t in table.batches[0]} == {0.1, 1.0}, "the base runs beside the first"
    looser = search(LETTERS, Greedy(), Plain(), Table(score), halving=Halving((0.1,), 0.75))
    assert looser.rounds[0].proxies[0].rank_agreement == 1


def test_a_cheap_trial_that_fails_drops_out():
    choice = search(LETTERS, Greedy(), Plain(), Table(failing=("za",)), halving=Halving())
    assert choice.rounds[0].candidates[0].verdict == "failed"
    assert choice.rounds[0].proxies[0].kept == 2


def test_kendall_s_tau():
    assert kendall_tau([(1, 1), (2, 2), (3, 3)]) == 1
    assert kendall_tau([(1, 3), (2, 2), (3, 1)]) == -1
    assert kendall_tau([(1, 1), (2, 3), (3, 2), (4, 4)]) == pytest.approx(2 / 3)
    assert kendall_tau([(1, 1)]) is None and kendall_tau([(1, 5), (2, 5)]) is None
    # tau-b by hand: concordant 4, discordant 1, one tie of six pairs
    assert kendall_tau([(1, 1), (1, 2), (2, 3), (3, 2.5)]) == pytest.approx(3 / np.sqrt(5 * 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": (0.5, 0.2)}, "rising"),
        ({"budgets": (1.0,)}, "between"),
        ({"keep": 1.0}, "keep"),
    ],
)
def test_halving_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Halving(**options)


def test_a_choice_is_plain_data():
    cost = Cost(parameters=1e9)
    run = lambda trials: [Result(t, 1.0 * len(t.members), cost=cost) for t in trials]  # noqa: E731
    data = json.loads(json.dumps(search(LETTERS, Greedy(), Plain(), run).dump()))
    assert data["chosen"] == list("zabcd") and data["strategy"] == "greedy"
    assert data["rounds"][0]["candidates"][0]["cost"]["parameters"] == 1e9


def test_asking_again_gives_the_same_search():
    known = {}

    def remembering(trials):
        known.update((t, Table(items=noisy).run(t)) for t in trials if t not in known)
        return [known[t] for t in trials]

    first, again = (
        search(LETTERS, Greedy(), NoiseAware(), remembering, seeds=(0, 1), resamples=100)
        for _ in range(2)
    )
    assert first == again
    assert all(isinstance(trial, Trial) for trial in known)
