"""A search from end to end on real, tiny models: what it leaves behind, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from eagle_moe.checkpoint import read_complete
from tests.processes import assert_gone, jobs_of, marked
from tests.suites import write_suite
from tests.tiny_run import make_world
from train.jobs.directory import Lock
from train.recipe import load_recipe
from train.search.__main__ import main
from train.search.ledger import Ledger
from train.search.run import LOCK
from train.sources import find_origins
from train.stages import StageRun

POOL = ("clip", "convnext")


@pytest.fixture(scope="module")
def search_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search over two experts, with two or three steps in a stage: two trials."""
    folder = tmp_path_factory.mktemp("world")
    recipe = make_world(folder, POOL)
    for stage in recipe["stages"].values():
        stage["args"]["save_strategy"] = "no"
    recipe["stages"]["sft"].pop("eval")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    write_suite(folder / "suite", per_skill=2)
    told = {
        "name": "tiny",
        "recipe": str(folder / "recipe.yaml"),
        "base": ["clip"],
        "strategy": {"kind": "exhaustive"},
        "rule": {"kind": "plain"},
        "features": "off",
        "evaluation": {"data": str(folder / "suite"), "batch_size": 6, "max_new_tokens": 8},
        "store": str(folder / "store"),
        "code": "this",
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(told))
    return folder / "search.yaml"


@pytest.fixture(scope="module")
def searched(search_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("searched") / "out"
    assert main([str(search_file), "--out", str(out), "keep=all"]) == 0
    return out


def rows(out: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {(*row["members"], row["seed"]): row for row in Ledger(out / "ledger.jsonl").rows}


def weights(out: Path) -> dict[tuple[Any, ...], str]:
    """Mixture -> hash of the weights that were scored."""
    cards = (out / "scores").rglob("card.json")
    found = {}
    for card in map(json.loads, (path.read_text() for path in cards)):
        config = json.loads(Path(card["model"], "config.json").read_text())
        names = tuple(each["name"] for each in config["vision_config"]["experts"])
        found[names] = card["identity"]["weights_sha256"]
    return found


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"{folder}/{pattern} did not appear"
        time.sleep(0.02)


def test_the_ledger_has_a_line_for_every_mixture(searched):
    told = rows(searched)
    assert set(told) == {("clip", 0), ("clip", "convnext", 0)}
    for row in told.values():
        assert row["status"] == "done"
        assert set(row["items"]) == {"text", "chart", "shapes"}
        assert all(len(items) == 2 for items in row["items"].values())
        assert 0 <= row["score"] <= 1
        assert row["cost"]["parameters"] > 0
        assert row["steps"] == 2 * (len(row["members"]) + 1) + 3


def test_every_expert_was_aligned_once(searched):
    cost = json.loads((searched / "summary.json").read_text())["cost"]
    assert cost["pre_alignments"] == len(POOL)
    assert cost["pre_alignments_without_reuse"] == 3
    assert cost["steps"] == 2 * 2 + 2 * 5
    assert cost["steps_without_reuse"] == 3 * 2 + 2 * 5
    places = sorted((searched / "experts").iterdir())
    assert [place.name.split("-")[0] for place in places] == sorted(POOL)
    assert not any((place / "run").exists() for place in places), "no copies of the LLM are kept"


def test_a_stored_expert_serves_any_recipe(searched, search_file, tmp_path):
    (place,) = (search_file.parent / "store" / "experts").glob("convnext-*")
    complete = read_complete(place)
    assert complete is not None and complete.expert == "convnext"
    recipe = load_recipe(search_file.parent / "recipe.yaml", [f"init.experts.convnext={place}"])
    start = recipe.model_copy(
        update={"stages": {"sft": recipe.stages["sft"].model_copy(update={"init_from": []})}}
    )
    assert find_origins(StageRun(start, "sft"))["experts.convnext"].place == str(place)


def test_the_report_and_the_model_are_there(searched):
    chosen = json.loads((searched / "summary.json").read_text())["chosen"]
    assert (searched / "report.html").is_file() and (searched / "report.md").is_file()
    config = json.loads((searched / "model" / "config.json").read_text())
    assert [each["name"] for each in config["vision_config"]["experts"]] == chosen


def test_the_same_command_again_runs_nothing(searched, search_file, capsys):
    before = (searched / "ledger.jsonl").read_bytes()
    summary = json.loads((searched / "summary.json").read_text())
    assert main([str(search_file), "--out", str(searched), "keep=all"]) == 0
    assert (searched / "ledger.jsonl").read_bytes() == before
    after = json.loads((searched / "summary.json").read_text())
    assert after.pop("clock") and summary.pop("clock") and after.pop("settings")
    summary.pop("settings")
    assert after == summary
    assert "jobs" not in capsys.readouterr().out.split("ended before")[1].split("round")[0]


def test_without_reuse_the_same_is_found_at_a_higher_cost(searched, search_file, tmp_path):
    assert main([str(search_file), "--out", str(tmp_path / "out"), "keep=all", "reuse=false"]) == 0
    shared = json.loads((searched / "summary.json").read_text())
    alone = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert alone["chosen"] == shared["chosen"]
    assert weights(tmp_path / "out") == weights(searched)
    assert len(weights(searched)) == 2
    assert alone["cost"]["steps"] == shared["cost"]["steps_without_reuse"]
    assert alone["cost"]["pre_alignments"] == 3


def test_killed_driver_and_worker_change_nothing(searched, search_file, tmp_path):
    """The real thing: its own store, a kill of the driver, one of a job, then left alone."""
    out, store = tmp_path / "out", tmp_path / "store"
    command = [sys.executable, "-m", "train.search", str(search_file), "--out", str(out)]
    command += ["keep=all", f"store={store}"]
    mark = f"EAGLE_MOE_TEST={tmp_path}"
    environment = os.environ | dict([mark.split("=", 1)])

    def start() -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    driver = start()
    try:
        wait_for(store, "experts/*/complete.json")
        driver.kill()
        driver.wait()
        assert_gone(list(marked(mark)), seconds=60)
        driver = start()
        wait_for(out, "stages/*/job.json")
        while not (victims := jobs_of(driver.pid, mark)):
            time.sleep(0.02)
        os.kill(victims[-1], signal.SIGKILL)
        assert driver.wait(300) == 0, (tmp_path / "log").read_text()
        assert_gone(list(marked(mark)), seconds=60)
    finally:
        driver.kill()
    assert weights(out) == weights(searched)
    told, expected = rows(out), rows(searched)
    assert {k: (v["score"], v["items"]) for k, v in told.items()} == {
        k: (v["score"], v["items"]) for k, v in expected.items()
    }
    assert len(Ledger(out / "ledger.jsonl").rows) == len(told)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rule.kind=noise_aware", "rule.kind: plain -> noise_aware"),
        ("seeds=[0,1]", r"seeds: \[0] -> \[0, 1]"),
        ("pool=[clip]", "pool: .*convnext"),
        ("overrides=[stages.sft.args.max_steps=9]", "recipe.stages.sft.args.max_steps: 3 -> 9"),
        ("code=other", "add code=this"),
    ],
)
def test_another_search_is_refused_in_its_folder(searched, search_file, override, said, capsys):
    before = (searched / "ledger.jsonl").read_bytes()
    assert main([str(search_file), "--out", str(searched), override]) == 2
    told = capsys.readouterr().err
    assert re.search(said, told), told
    assert "another search lives in this folder" in told and "Choose another --out" in told
    assert (searched / "ledger.jsonl").read_bytes() == before


def test_a_second_driver_is_refused(searched, search_file, capsys, monkeypatch):
    monkeypatch.setattr("train.jobs.directory.LOCK_WAIT", 0.1)
    lock = Lock.take(searched, LOCK)
    assert main([str(search_file), "--out", str(searched)]) == 2
    lock.release()
    assert f"another run (process {os.getpid()}" in capsys.readouterr().err


def test_a_dry_run_says_what_there_would_be_and_writes_nothing(search_file, tmp_path, capsys):
    assert main([str(search_file), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "round 1: clip+convnext\n" in told
    assert "pre-alignments: 2 at most; without reuse, 3" in told
    assert not (tmp_path / "out").exists()


def test_missing_data_are_told_before_anything_is_spent(search_file, tmp_path, capsys):
    gone = "overrides=[data.captions.path=nowhere.jsonl]"
    assert main([str(search_file), "--out", str(tmp_path / "out"), gone]) == 2
    assert "data.captions: no such file: nowhere.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out" / "stages").exists()
