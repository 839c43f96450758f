"""The scorers of the pinned lmms-eval give what they gave when the golden records were made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.own_process import ROOT, call

pytest.importorskip("lmms_eval")

GOLDENS = Path(os.environ.get("SCORER_GOLDENS", ROOT.parent / "shared/goldens/scorers"))
WHY_NOT = f"no golden records in {GOLDENS}; name their folder in SCORER_GOLDENS"

METRICS = (
    "anls",
    "gqa_exact_match",
    "mathvista_normalise",
    "mme_correct",
    "mme_perception_total",
    "mmmu_open",
    "mmmu_multi_choice",
    "ocrbench_contains",
    "pope_correct",
    "pope_aggregate",
    "relaxed_accuracy",
    "vqa_accuracy",
    "mmbench_en_dev_static",
    "mmbench_circular",
    "mmbench_prefetch",
    "seed_image",
    "scienceqa_img",
    "ai2d",
    "realworldqa",
    "mmvp_letter",
    "mmvp_pair_accuracy",
)
MISTAKEN = (
    "anls",
    "gqa_exact_match",
    "mme_correct",
    "mmmu_open",
    "ocrbench_contains",
    "pope_correct",
    "relaxed_accuracy",
)


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> dict:
    if not GOLDENS.is_dir():
        pytest.skip(WHY_NOT)
    return call("tests.scorers.check", tmp_path_factory.mktemp("home"), goldens=GOLDENS)


@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_the_golden_ones(checked, metric):
    assert checked["asked"][metric] > 0
    assert checked["differ"].get(metric, []) == []


def test_no_metric_is_left_out(checked):
    assert checked["asked"].keys() == set(METRICS)


@pytest.mark.parametrize("metric", MISTAKEN)
def test_a_scorer_that_was_changed_would_be_seen(checked, metric):
    assert checked["mistaken"][metric] > 0
