"""train/tasks.py: scores of the harness while a run trains, which is none the wiser for them.

All but one of these tests have a stand-in for the harness, which takes ten seconds to start.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train.tasks
from eagle_moe.scores.answer import read_answers
from eagle_moe.scores.card import SKILLS, Card
from eagle_moe.scores.identity import hash_weights
from eval.child import BEAT
from eval.harness import Settings
from tests.engine_runs import run_on_two
from tests.interrupted import Attempt, Recipe, make_hard_world, put, result
from tests.suites import write_suite
from tests.test_card import make_answers, make_card, make_identity, save
from tests.tiny_run import make_world, recipe_in
from train.curve import read_curve
from train.moved import TrainingFault
from train.run import run_recipe
from train.signals import STOP_CODE
from train.workspace import last_point

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="needs the extra `eval`"
)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"), per_skill=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, suite: Path) -> Recipe:
    """Dropout, LoRA, loader workers, three epochs; a moving average; tasks at 4, 8, 12 and 14."""
    recipe = make_hard_world(tmp_path_factory.mktemp("world"))
    return with_tasks(recipe, suite, every=4, ema=0.9)


def with_tasks(
    recipe: Recipe, suite: Path, every: int = 4, ema: Any = None, **tasks: Any
) -> Recipe:
    told = {"names": ["skills"], "data": str(suite), "every": every, "device": "cpu"} | tasks
    return recipe | {"stages": {"sft": recipe["stages"]["sft"] | {"ema": ema, "tasks": told}}}


def without_tasks(recipe: Recipe) -> Recipe:
    return recipe | {"stages": {"sft": recipe["stages"]["sft"] | {"tasks": None}}}


Harness = Callable[..., dict[str, Card]]


def stand_in(before: Callable[[Settings, Callable[[], None]], None] = lambda *_: None) -> Harness:
    """A score that depends on the weights, after `before(settings, heartbeat)`."""

    def harness(settings: Settings, heartbeat: Callable[[], None]) -> dict[str, Card]:
        heartbeat()
        before(settings, heartbeat)
        models = list(Path(settings.out).parent.glob("*/model"))
        assert models == [Path(settings.model)], "those of other steps take no disk"
        weights = hash_weights(settings.model)
        right = int(weights, 16) % 11
        answers = make_answers(text=right, chart=3)
        card = make_card(answers, identity=make_identity(weights_sha256=weights))
        save(Path(settings.out, SKILLS), answers, card)
        return {SKILLS: card}

    return harness


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Callable[[Harness], None]:
    def use(instead: Harness) -> None:
        monkeypatch.setattr(train.tasks, "run_harness", instead)

    use(stand_in())
    return use


@pytest.fixture(scope="module")
def undisturbed(world: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with tasks that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.tasks, "run_harness", stand_in())
        return run_recipe(world | {"output_dir": str(tmp_path_factory.mktemp("whole") / "run")})


def curve(folder: Path) -> str:
    return (folder / "tasks.jsonl").read_text()


def without_scores(found: dict[str, Any]) -> dict[str, Any]:
    """A run's results without what tasks add to logs."""
    ours = ("eval_eagle", "eval/eagle")
    log = [{k: v for k, v in line.items() if not k.startswith(ours)} for line in found["log"]]
    board = {k: v for k, v in found["tensorboard"].items() if not k.startswith(ours)}
    del board["train/epoch"]  # comes with every line, those of scores too
    return (
        found
        | {"log": [line for line in log if set(line) > {"step", "epoch"}]}
        | {
            "tensorboard": board,
            "texts": None,  # the recipe is among them
        }
    )


def test_the_run_is_the_same_with_tasks_as_without(
    world: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    """Weights, losses, norms, order of samples, dropout, curve: bit for bit."""
    alone = run_recipe(without_tasks(world) | {"output_dir": str(tmp_path / "run")})
    assert not (alone / "tasks.jsonl").exists()
    found = result(undisturbed)
    assert len(found["log"]) == len(result(alone)["log"]) + 4
    assert without_scores(found) == without_scores(result(alone))


def test_scores_are_kept_with_their_cards_and_drawn(world: Recipe, undisturbed: Path) -> None:
    rows = read_curve(undisturbed / "tasks.jsonl")
    assert [row["step"] for row in rows if row["part"] == "total"] == [4, 8, 12, 14]
    assert set(rows[0]) == {"step", "task", "metric", "part", "value", "low", "high", "n"}
    for row in rows:
        card = Card.load(undisturbed / f"tasks/step-{row['step']:06d}" / SKILLS)
        assert card.metrics["accuracy"][row["part"]].value == row["value"]
    # the last step's model, moving average and merged adapters included, is what the run ends in
    assert card.identity.weights_sha256 == hash_weights(undisturbed)
    drawn = result(undisturbed)["tensorboard"]["eval/eagle_skills_accuracy_text"]
    text = [row for row in rows if row["part"] == "text"]
    assert dict(drawn) == pytest.approx({row["step"]: row["value"] for row in text})
    left = {path.name for path in (undisturbed / "tasks").rglob("*") if path.is_file()}
    assert left == {"card.json", "items.jsonl.gz"}


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(step: int, what: Callable[..., None]) -> Harness:
    """Something that happens while this step's tasks are asked."""

    def before(settings: Settings, heartbeat: Callable[[], None]) -> None:
        if settings.out.endswith(f"{step:06d}"):
            what(settings, heartbeat)

    return stand_in(before)


def asked_to_stop(_: Settings, heartbeat: Callable[[], None]) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    heartbeat()
    raise AssertionError("a heartbeat ends the harness of a run that is to stop")


@pytest.mark.parametrize(
    ("step", "what", "code"),
    [(8, asked_to_stop, STOP_CODE), (14, die, -signal.SIGKILL)],
)
def test_what_was_cut_off_is_made_up_for(
    world: Recipe, undisturbed: Path, tmp_path: Path, harness: Any, step: int, what: Any, code: int
) -> None:
    recipe = world | {"output_dir": str(tmp_path / "run")}
    attempt = Attempt(recipe, put(train.tasks, "run_harness", at(step, what)))
    assert attempt.exit_code() == code, attempt.log.read_text()
    if code == STOP_CODE:  # the step is saved without waiting for its scores
        assert last_point(tmp_path / "run/unfinished/sft").name == "checkpoint-8"
    beyond = {"step": 13, "failed": "after the resume point"}  # a step that is not asked again
    with (tmp_path / "run/unfinished/sft/tasks.jsonl").open("a") as file:
        file.write(json.dumps(beyond) + "\n")
    asked: list[str] = []
    harness(stand_in(lambda settings, _: asked.append(settings.out[-6:])))
    folder = run_recipe(recipe)
    assert curve(folder) == curve(undisturbed)
    assert without_scores(result(folder)) == without_scores(result(undisturbed))
    assert asked == {8: ["000008", "000012", "000014"], 14: ["000014"]}[step]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make_world(folder)
    return folder


def test_asked_to_stop_at_the_last_step_its_scores_are_made_up_for_too(
    small: Path, suite: Path, tmp_path: Path, harness: Any
) -> None:
    recipe = with_tasks(recipe_in(small, tmp_path / "run", eval=None), suite)
    attempt = Attempt(recipe, put(train.tasks, "run_harness", at(3, asked_to_stop)))
    assert attempt.exit_code() == STOP_CODE, attempt.log.read_text()
    assert "saved after step 3; stopped by SIGTERM" in attempt.log.read_text()
    rows = read_curve(run_recipe(recipe) / "tasks.jsonl")
    assert [row["step"] for row in rows] == [3, 3, 3]


def broken(*_: Any) -> None:
    raise RuntimeError("the harness ended with 1")


def test_a_failed_evaluation_is_said_loudly_and_costs_no_training(
    small: Path, suite: Path, tmp_path: Path, harness: Any, capsys: Any
) -> None:
    harness(at(2, broken))
    recipe = with_tasks(recipe_in(small, tmp_path / "run", lr={}), suite, every=2)
    rows = read_curve(run_recipe(recipe) / "tasks.jsonl")
    assert rows[0] == {"step": 2, "failed": "the harness ended with 1"}
    assert [row["step"] for row in rows[1:]] == [3, 3, 3]
    said = capsys.readouterr().err
    assert "step 2: ITS TASKS WERE NOT SCORED: the harness ended with 1" in said
    assert "1 of its evaluations failed" in said


def test_a_failed_evaluation_ends_the_run_if_asked_to(
    small: Path, suite: Path, tmp_path: Path, harness: Any
) -> None:
    recipe = recipe_in(small, tmp_path / "run", lr={})
    recipe = with_tasks(recipe, suite, every=2, on_failure="stop")
    harness(at(2, broken))
    with pytest.raises(TrainingFault, match=r"step 2.*ended with 1\n.*tasks.on_failure=go_on"):
        run_recipe(recipe)
    harness(stand_in())
    rows = read_curve(run_recipe(recipe) / "tasks.jsonl")
    assert [row["step"] for row in rows if row["part"] == "total"] == [2, 3]


def test_other_processes_wait_longer_than_their_patience(
    small: Path, suite: Path, tmp_path: Path, harness: Any
) -> None:
    """Collectives end after two seconds here, and the harness takes four."""

    def slow(_: Settings, heartbeat: Callable[[], None]) -> None:
        for _ in range(4):
            time.sleep(BEAT)
            heartbeat()

    harness(at(3, slow))
    recipe = recipe_in(small, tmp_path / "run", lr={}, batch_size=2)
    recipe = with_tasks(recipe, suite, every=9) | {"engine": "ddp"}
    recipe["stages"]["sft"]["args"] |= {"ddp_timeout": 2, "use_cpu": True}
    assert run_on_two(recipe, tmp_path / "ranks") == [(0, ""), (0, "")]
    rows = read_curve(tmp_path / "run/sft/tasks.jsonl")
    assert {row["step"] for row in rows} == {3}
    state = json.loads((tmp_path / "run/sft/trainer_state.json").read_text())
    (line,) = [entry for entry in state["log_history"] if "eval_eagle_skills_accuracy" in entry]
    assert line["step"] == 3


@pytest.mark.parametrize(
    ("tasks", "complaint"),
    [
        ({"names": ["skils"]}, r'sft: tasks: tasks: no "skils". Did you mean "skills"'),
        ({"names": ["docvqa_vall"]}, 'Did you mean "docvqa_val"'),
        ({"data": None}, "sft: tasks: data: say where the suite is"),
        ({"data": "nowhere"}, r"sft: tasks: nowhere.*no such file"),
        ({"names": ["pope"], "data": "nowhere"}, "nowhere: no such folder"),
        ({"names": []}, "names"),
        ({"evry": 3}, 'unknown key.*Did you mean "every"'),
    ],
)
@needs_lmms_eval
def test_what_cannot_be_asked_is_told_before_training(
    small: Path, suite: Path, tmp_path: Path, tasks: dict[str, Any], complaint: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        run_recipe(with_tasks(recipe_in(small, tmp_path / "run", lr={}), suite, **tasks))
    assert not (tmp_path / "run").exists()


def test_tasks_are_no_part_of_what_a_run_is(small: Path, suite: Path, tmp_path: Path) -> None:
    recipe = recipe_in(small, tmp_path / "run", lr={})
    folder = run_recipe(recipe)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    run_recipe(with_tasks(recipe, suite))
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


@needs_lmms_eval
def test_the_real_harness(small: Path, suite: Path, tmp_path: Path) -> None:
    recipe = with_tasks(recipe_in(small, tmp_path / "run", lr={}), suite, every=9, limit=4)
    folder = run_recipe(recipe)
    card = Card.load(folder / "tasks/step-000003" / SKILLS)
    assert card.identity.weights_sha256 == hash_weights(folder)
    assert card.identity.recipe["name"] == "tiny"
    assert len(read_answers(folder / "tasks/step-000003" / SKILLS)) == 4
    assert {row["step"] for row in read_curve(folder / "tasks.jsonl")} == {3}
