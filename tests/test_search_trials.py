"""What a search is told of its trials: failures, numbers that are none, and nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.toy_trials import InlineExecutor, ToyPlanner
from train.search.ledger import Ledger
from train.search.pool import Pool
from train.search.rules import Plain
from train.search.strategies import Greedy, search
from train.search.tally import tally
from train.search.trial import Trial
from train.search.trials import Trials

CLIP, SAM, BOTH = ("clip",), ("clip", "sam"), ("clip", "sam", "eva02")


class World:
    """Trials in a folder, as often as one sits down to them."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.executor = InlineExecutor()

    def sit_down(self, retry_failed: bool = False) -> Trials:
        self.executor = InlineExecutor()
        planner = ToyPlanner(self.out, seconds=0)
        ledger = Ledger(self.out / "ledger.jsonl")
        return Trials(planner, self.executor, ledger, {"search": "s", "code": "c"}, retry_failed)

    def rows(self) -> list[dict[str, Any]]:
        return Ledger(self.out / "ledger.jsonl").rows


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


def test_results_come_in_the_order_of_the_trials(world):
    results = world.sit_down()([Trial(SAM), Trial(CLIP, 1), Trial(CLIP)])
    assert [(r.trial.members, r.trial.seed) for r in results] == [(SAM, 0), (CLIP, 1), (CLIP, 0)]
    assert all(r.score is not None and r.cost.parameters for r in results)
    assert world.executor.ran.count("align clip") == 1


def test_what_has_ended_is_not_run_again(world):
    first = world.sit_down()([Trial(SAM), Trial(CLIP)])
    again = world.sit_down()([Trial(CLIP), Trial(SAM)])
    assert world.executor.ran == []
    assert sorted(r.score for r in again) == sorted(r.score for r in first)
    assert len(world.rows()) == 2


def test_a_line_says_all_that_a_report_needs(world):
    world.sit_down()([Trial(SAM, 1)])
    (row,) = world.rows()
    assert (row["members"], row["seed"], row["budget"]) == (["clip", "sam"], 1, 1.0)
    assert (row["status"], row["search"], row["code"]) == ("done", "s", "c")
    assert set(row["items"]) == {"charts", "text"}
    assert row["score"] == pytest.approx(
        sum(sum(v) / len(v) for v in row["items"].values()) / len(row["items"])
    )
    assert row["steps"] == 20 and len(row["stages"]) == 2
    assert row["started"] <= row["finished"]


def test_an_expert_that_fails_fails_its_mixtures_alone(world, capsys):
    (world.out / "broken-sam").touch()
    clip, sam, both = world.sit_down()([Trial(CLIP), Trial(SAM), Trial(BOTH)])
    assert clip.score is not None
    assert sam.score is None and both.score is None
    assert "align sam: failed, sam is broken" in sam.error
    assert str(world.out / "experts/sam/log.txt") in sam.error
    told = {tuple(row["members"]): row for row in world.rows()}
    assert told[SAM]["status"] == "failed" and told[SAM]["log"].endswith("sam/log.txt")
    assert "clip+sam seed 0: failed: align sam: failed, sam is broken" in capsys.readouterr().out


def test_a_failed_trial_is_run_again_only_if_asked(world):
    (world.out / "broken-clip+sam").touch()
    world.sit_down()([Trial(SAM)])
    (world.out / "broken-clip+sam").unlink()
    (still,) = world.sit_down()([Trial(SAM)])
    assert still.score is None and world.executor.ran == []
    trials = world.sit_down(retry_failed=True)
    (now,) = trials([Trial(SAM)])
    assert now.score is not None
    assert [row["status"] for row in world.rows()] == ["failed", "done"]
    assert Ledger(world.out / "ledger.jsonl").by_key["clip+sam seed 0"]["status"] == "done"


def test_what_fails_again_is_not_tried_for_ever(world):
    (world.out / "broken-clip+sam").touch()
    world.sit_down()([Trial(SAM)])
    trials = world.sit_down(retry_failed=True)
    for _ in range(3):
        trials([Trial(SAM)])
    assert world.executor.ran.count("score clip+sam seed 0") == 1


def test_a_score_that_is_no_number_is_a_failure(world):
    (world.out / "nan-clip+sam").touch()
    (result,) = world.sit_down()([Trial(SAM)])
    assert result.score is None
    assert "the score is nan, not a number" in result.error
    json.loads((world.out / "ledger.jsonl").read_text(), parse_constant=pytest.fail)


def test_a_round_goes_on_without_a_candidate_that_fails(world):
    (world.out / "broken-eva02").touch()
    pool = Pool(("clip", "sam", "eva02"), CLIP)
    choice = search(pool, Greedy(), Plain(), world.sit_down())
    assert choice.chosen == SAM
    failed = [c for c in choice.rounds[0].candidates if c.verdict == "failed"]
    assert [c.changed for c in failed] == ["eva02"]
    assert "eva02 is broken" in failed[0].error


def test_a_base_that_fails_ends_the_search(world):
    (world.out / "broken-clip").touch()
    with pytest.raises(ValueError, match="clip is broken"):
        search(Pool(("clip", "sam"), CLIP), Greedy(), Plain(), world.sit_down())


def test_work_is_counted_once_and_needs_as_often_as_they_came(world):
    world.sit_down()([Trial(CLIP), Trial(SAM), Trial(BOTH)])
    reuse, clock = tally(world.rows())
    assert (reuse.pre_alignments, reuse.pre_alignments_without_reuse) == (3, 6)
    assert (reuse.steps, reuse.steps_without_reuse) == (30, 60)
    assert clock.jobs == pytest.approx(0.3)
    rows = world.rows()
    for row in rows:
        for stage in row["stages"]:
            stage["trained"] = stage["expert"] != "clip"
    found, _ = tally(rows)
    assert (found.pre_alignments, found.experts_found, found.steps) == (2, 1, 20)
