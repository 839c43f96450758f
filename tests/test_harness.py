"""eval/harness.py, engine, outcome, tasks: real tasks and scorers of lmms-eval, end to end.

All of it in one process (`tests/own_process.py`), as importing lmms-eval takes long.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from eagle_moe.scores.answer import ITEMS, read_answers
from tests.own_process import call
from tests.suites import write_suite

pytest.importorskip("lmms_eval")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_folder) -> dict:
    folder = tmp_path_factory.mktemp("harness")
    suite = write_suite(folder / "suite", per_skill=3)
    made = call(
        "tests.harness_worlds.everything",
        folder / "home",
        benchmark_data=folder / "benchmarks",
        benchmark_out=folder / "benchmark-scores",
        model=tiny_folder,
        data=suite,
        out=folder / "out",
    )
    return {
        "oracles": made["oracles"],
        "found": made["skills"],
        "suite": suite,
        "out": folder / "out",
    }


@pytest.fixture(scope="module")
def oracles(world) -> dict:
    return world["oracles"]


def totals(found: dict) -> dict[str, float]:
    return {metric: parts["total"]["value"] for metric, parts in found["metrics"].items()}


def test_pope_by_hand(oracles):
    """Of 8 answers 6 are a bare yes or no: 2 true positives, 1 false one, 1 false negative."""
    found = oracles["pope"]
    assert totals(found) == pytest.approx(
        {
            "pope_accuracy": 4 / 8,
            "pope_precision": 2 / 3,
            "pope_recall": 2 / 3,
            "pope_f1_score": 2 / 3,
            "pope_yes_ratio": 4 / 8,
        }
    )
    assert found["means"] == []
    for parts in found["metrics"].values():
        assert parts["total"]["low"] < parts["total"]["value"] < parts["total"]["high"]
        assert parts["total"]["n"] == 8
    ending = "?\nAnswer the question using a single word or phrase."
    assert all(prompt.endswith(ending) for prompt in found["prompts"])
    item = found["items"][2]
    assert (item["id"], item["part"], item["target"]) == ("2", "adversarial", "yes")
    assert item["prediction"] == "yes"
    assert item["fields"]["image_source"].startswith("COCO")


def test_a_limit_asks_the_first_questions(oracles):
    found = oracles["pope, first three"]
    assert len(found["items"]) == len(found["prompts"]) == 3
    assert totals(found)["pope_recall"] == pytest.approx(2 / 3)


def test_chartqa_by_hand(oracles):
    """Within 5 % counts, and so does another way to write one half; every half has its own n."""
    found = oracles["chartqa"]
    assert totals(found) == pytest.approx(
        {"relaxed_overall": 4 / 6, "relaxed_human_split": 2 / 3, "relaxed_augmented_split": 2 / 3}
    )
    assert found["means"] == list(totals(found))
    assert found["primary"] == "relaxed_overall"
    human = found["metrics"]["relaxed_human_split"]["total"]
    assert human["n"] == 3
    assert [item["scores"]["relaxed_overall"] for item in found["items"]] == [1, 1, 0, 1, 1, 0]
    assert found["items"][0]["scores"].keys() == {"relaxed_overall", "relaxed_human_split"}


def test_docvqa_by_hand(oracles):
    """ANLS: case is free, 4 of 10 letters wrong is 0.6, half of them 0.5, more is none."""
    found = oracles["docvqa_val"]
    assert totals(found) == {"anls": pytest.approx((1 + 0.6 + 0.5 + 0 + 1) / 5)}
    assert [item["id"] for item in found["items"]] == ["337", "338", "339", "340", "341"]
    assert found["items"][4]["target"] == ["a b", "1998"]


def test_a_judge_without_a_key_is_not_run_and_nothing_is_guessed(oracles):
    found = oracles["judged"]
    assert found["metrics"] == {}
    assert "judge, and there is no key: set OPENAI_API_KEY" in found["not_run"][found["primary"]]
    assert [item["prediction"] for item in found["items"]] == ["3", "it is seven", "5"]
    assert all(item["scores"] == {} for item in found["items"])
    # where no answer needs the judge, there is a score without a key
    unasked = oracles["mathvista_testmini_format"]
    assert next(iter(totals(unasked).values())) == pytest.approx(100 * 2 / 3, abs=0.01)


def test_a_missing_data_set_is_named_with_what_to_do(oracles):
    told = oracles["missing"]
    assert "task ai2d: its data set lmms-lab-encoder/ai2d is not here, and this run is off" in told
    assert "hf download lmms-lab-encoder/ai2d --repo-type dataset --local-dir" in told


def independent_check(items: Path, suite: Path) -> dict[str, tuple[float, int]]:
    """Accuracy and number per skill and in total, from nothing but the two files."""
    truth = {}
    with (suite / "test.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            truth[record["id"]] = record
    said = {}
    with gzip.open(items, "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            item = json.loads(line)
            assert item["id"] not in said, "an item is there twice"
            said[item["id"]] = item["prediction"]
    assert said.keys() == truth.keys(), "items are missing, or were not asked"
    skills = {record["skill"] for record in truth.values()}
    result = {}
    for skill in ["total", *sorted(skills)]:
        right = asked = 0
        for name, record in truth.items():
            if skill not in ("total", record["skill"]):
                continue
            asked += 1
            right += said[name].strip().casefold() == record["answer"].strip().casefold()
        result[skill] = (right / asked, asked)
    return result


def test_the_card_is_what_an_independent_check_gives(world):
    items = world["out"] / "eight" / "eagle_skills" / ITEMS
    card = world["found"]["eight"]
    told = {part: (one["value"], one["n"]) for part, one in card["metrics"]["accuracy"].items()}
    assert told == independent_check(items, world["suite"])
    assert card["questions_per_second"] > 0
    assert (card["images_seen"], card["images_encoded"]) == (9, 9)
    task = card["identity"]["task"]
    assert (task["name"], task["version"], task["seed"]) == ("eagle_skills", "3", 5)
    assert card["identity"]["decoding"]["until"] == []
    assert card["identity"]["decoding"]["max_new_tokens"] == 16
    assert {"lmms_eval", "datasets"} <= card["identity"]["versions"].keys()


def test_the_answers_do_not_depend_on_the_batch_size(world):
    one, eight = (world["out"] / name / "eagle_skills" for name in ("one", "eight"))
    assert read_answers(one) == read_answers(eight)
    assert len({answer.prediction for answer in read_answers(one)}) > 4
    assert world["found"]["one"]["identity"]["batch_size"] == 1


def test_what_is_finished_is_read_back(world):
    (card,), seen = world["found"]["again"]
    assert card == world["found"]["eight"]
    assert seen == [[9, 9, "eagle_skills: finished before"]]


def test_an_interrupted_run_keeps_what_is_finished(world):
    found = world["found"]["interrupted"]
    assert found["kept"] == 8
    assert found["seen"] == [8, 9]
    assert found["rest"] == pytest.approx(1, rel=0.1)  # of 9 questions, 8 were answered before
    assert found["card"]["metrics"] == world["found"]["eight"]["metrics"]
    assert found["files"] == ["card.json", "items.jsonl.gz"]


def test_a_blind_run_and_a_part_of_the_suite(world):
    blind = world["found"]["blind"]
    assert blind["identity"]["task"]["images"] == "drop"
    assert blind["images_seen"] == 0
    assert (
        blind["identity"]["task"]["data_sha256"]
        == (world["found"]["eight"]["identity"]["task"]["data_sha256"])
    )
    three = world["found"]["three"]["metrics"]["accuracy"]
    assert {skill: one["n"] for skill, one in three.items()} == {
        "total": 3,
        "text": 1,
        "chart": 1,
        "shapes": 1,
    }


def test_a_right_answer_must_fit_into_the_cap(world):
    assert "its answer has 8 tokens, but max_new_tokens is 5" in world["found"]["short"]


def test_one_task_that_fails_is_named_and_the_others_run(world):
    found = world["found"]["failed"]
    assert "1 of 2 tasks failed" in found["message"]
    assert "pope: task pope: its data set lmms-lab-encoder/POPE is not here" in found["message"]
    assert found["card"]["metrics"] == world["found"]["eight"]["metrics"]
