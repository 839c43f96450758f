"""A run that is killed at any moment, again and again, ends where one that was left alone ends."""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers.trainer
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

import train.run
from tests.interrupted import STEPS, Attempt, Recipe, at_steps, make_hard_world, put, result
from tests.tiny_run import make_world
from train.continuing import Continuing
from train.curve import CurveWriter
from train.resume import ResumePoints
from train.run import run_recipe
from train.tensorboard import TensorBoardLog
from train.workspace import last_point

KILLS = 20
SEED = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_hard_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(world: Recipe) -> Path:
    return run_recipe(world)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(step: int) -> Callable[[], None]:
    return lambda: at_steps(lambda now: die() if now == step else None)


def die_saving(at: int) -> Callable[[], None]:
    """Die at file operation `at` of all saves together.

    Opening, making, renaming and removing a file are operations, so this is between any two.
    """
    left, depth = at, 0

    def count(event: str, _: Any) -> None:
        nonlocal left
        if depth and left and event.startswith(("open", "os.", "shutil.")):
            left -= 1
            if not left:
                die()

    def marked(save: Callable[..., None]) -> Callable[..., None]:
        def saving(*args: Any, **options: Any) -> None:
            nonlocal depth
            depth += 1
            save(*args, **options)
            depth -= 1

        return saving

    def prepare() -> None:
        sys.addaudithook(count)
        ResumePoints._save_checkpoint = marked(ResumePoints._save_checkpoint)  # type: ignore
        train.run.save_run = marked(train.run.save_run)

    return prepare


def test_twenty_kills_change_nothing(world: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    expected, dice, kills = result(undisturbed), random.Random(SEED), []
    for number in itertools.count():
        recipe = world | {"output_dir": str(tmp_path / f"{number}")}
        while not Path(recipe["output_dir"], "sft").exists():
            kind = dice.choice(["saving", "saving", "stepping", "any"])
            if len(kills) >= KILLS:
                attempt = Attempt(recipe)
            elif kind == "saving":
                attempt = Attempt(recipe, die_saving(dice.randint(1, 150)))
            else:
                attempt = Attempt(recipe)
                attempt.kill(dice.uniform(0, 1.5), after_a_step=kind == "stepping")
            code = attempt.exit_code()
            assert code in (0, -signal.SIGKILL), attempt.log.read_text()
            kills += [kind] * (code != 0)
        run_recipe(recipe)  # killed after the last rename, it has only its workspace to remove
        assert result(Path(recipe["output_dir"], "sft")) == expected
        assert os.listdir(recipe["output_dir"]) == ["sft"]
        if len(kills) >= KILLS:
            break
    assert kills.count("saving") >= KILLS // 4


@pytest.fixture(scope="module")
def interrupted(world: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run that was killed after step 11, of which resume point 9 is the last."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    assert Attempt(world | {"output_dir": str(out)}, die_at(11)).exit_code() == -signal.SIGKILL
    assert last_point(out / "unfinished/sft") == out / "unfinished/sft/checkpoint-9"
    return out


def go_on(
    world: Recipe, interrupted: Path, out: Path, prepare: Callable[[], None] = lambda: None
) -> Attempt:
    shutil.copytree(interrupted, out)
    return Attempt(world | {"output_dir": str(out)}, prepare)


def nothing(*_: Any, **__: Any) -> None: ...


def log_anew(self: TensorBoardLog, *args: Any, **more: Any) -> None:
    TensorBoardCallback.on_train_begin(self, *args, **more)


@pytest.mark.parametrize(
    ("mistake", "shown"),
    [
        (put(Trainer, "_load_rng_state", nothing), {"weights", "log"}),
        (
            put(transformers.trainer, "skip_first_batches", lambda loader, _: loader),
            {"weights", "log"},
        ),
        (put(Continuing, "_restore", nothing), {"log", "tensorboard"}),
        (put(CurveWriter, "on_train_begin", nothing), {"curve"}),
        (put(TensorBoardLog, "on_train_begin", log_anew), {"tensorboard"}),
    ],
    ids=["random numbers", "order of samples", "totals", "curve", "tensorboard"],
)
def test_the_comparison_sees_what_is_not_restored(
    world: Recipe,
    undisturbed: Path,
    interrupted: Path,
    tmp_path: Path,
    mistake: Callable[[], None],
    shown: set[str],
) -> None:
    attempt = go_on(world, interrupted, tmp_path / "run", mistake)
    assert attempt.exit_code() == 0, attempt.log.read_text()
    expected, found = result(undisturbed), result(tmp_path / "run/sft")
    assert shown <= {name for name in expected if expected[name] != found[name]}


def test_it_says_where_it_goes_on_and_what_it_passes_over(
    world: Recipe, undisturbed: Path, interrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    point = tmp_path / "run/unfinished/sft/checkpoint-9"
    (point / "optimizer.pt").write_bytes(b"half")
    attempt = Attempt(world | {"output_dir": str(tmp_path / "run")})
    assert attempt.exit_code() == 0, attempt.log.read_text()
    said = attempt.log.read_text()
    assert f"passed over {point}: optimizer.pt has 4 bytes instead of" in said
    assert f"sft: continues from {point.with_name('checkpoint-6')}" in said
    assert result(tmp_path / "run/sft") == result(undisturbed)


def test_killed_after_its_last_step_it_makes_no_other_one(
    world: Recipe, undisturbed: Path, interrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    attempt = go_on(world, interrupted, out, put(train.run, "save_run", die))
    assert attempt.exit_code() == -signal.SIGKILL
    assert last_point(out / "unfinished/sft") == out / f"unfinished/sft/checkpoint-{STEPS}"
    run_recipe(world | {"output_dir": str(out)})
    assert result(out / "sft") == result(undisturbed)


def test_a_full_disk_stops_the_run_and_costs_no_resume_point(
    world: Recipe, undisturbed: Path, interrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"

    def fill(step: int) -> None:
        if step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))

    attempt = go_on(world, interrupted, out, lambda: at_steps(fill))
    assert attempt.exit_code() == 2
    assert "checkpoint-12: no room to save it" in attempt.log.read_text()
    assert last_point(out / "unfinished/sft") == out / "unfinished/sft/checkpoint-9"
    assert not list((out / "unfinished/sft").glob(".*"))
    run_recipe(world | {"output_dir": str(out)})
    assert result(out / "sft") == result(undisturbed)


def test_a_killed_fan_out_goes_on_with_the_experts_that_are_not_finished(tmp_path: Path) -> None:
    recipe = make_world(tmp_path)
    recipe["stages"] = {"pre_align": recipe["stages"]["pre_align"]}

    def die_in_the_second_run() -> None:
        training_step = Continuing.training_step

        def marked(self: Continuing, *args: Any, **options: Any) -> Any:
            if Path(self.args.output_dir).name == "convnext" and self.state.global_step == 1:
                die()
            return training_step(self, *args, **options)

        Continuing.training_step = marked  # type: ignore[method-assign]

    assert Attempt(recipe, die_in_the_second_run).exit_code() == -signal.SIGKILL
    first = tmp_path / "run/pre_align/clip/model.safetensors"
    changed = first.stat().st_mtime_ns
    attempt = Attempt(recipe)
    assert attempt.exit_code() == 0
    said = attempt.log.read_text()
    assert "pre_align/clip: finished before" in said
    assert "pre_align/convnext: continues from" in said
    assert first.stat().st_mtime_ns == changed
