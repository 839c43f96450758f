from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import make_recipe, make_world
from train.arguments import training_arguments
from train.recipe import parse_recipe
from train.stages import StageRun


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return make_recipe(folder)


def run_with(recipe: dict[str, Any], *overrides: str) -> StageRun:
    return StageRun(parse_recipe(recipe, "recipe", overrides), "sft")


def test_any_training_argument_is_reachable(recipe: dict[str, Any]) -> None:
    told = ["stages.sft.args.adam_beta2=0.95", "stages.sft.args.lr_scheduler_type=cosine", "seed=3"]
    args = training_arguments(run_with(recipe, *told))
    assert (args.adam_beta2, args.lr_scheduler_type) == (0.95, "cosine")
    assert (args.seed, args.data_seed, args.learning_rate) == (3, 3, 1e-3)
    assert (args.eval_strategy, args.eval_steps, args.per_device_eval_batch_size) == ("steps", 2, 4)
    assert not args.logging_nan_inf_filter and not args.remove_unused_columns


def test_a_value_that_transformers_refuses_names_the_stage(recipe: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stages.sft: args: .*cosin"):
        training_arguments(run_with(recipe, "stages.sft.args.lr_scheduler_type=cosin"))


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [
        (32, None, 1, (32, 1)),
        (32, 8, 1, (8, 4)),
        (256, 8, 32, (8, 1)),
        (256, 8, 8, (8, 4)),
        (256, None, 8, (32, 1)),
    ],
)
def test_the_batch_is_the_same_on_any_number_of_processes(
    recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    micro: int | None,
    processes: int,
    expected: tuple[int, int],
) -> None:
    told = [f"stages.sft.batch_size={batch}"]
    told += [f"stages.sft.args.per_device_train_batch_size={micro}"] if micro else []
    run = run_with(recipe, *told)
    monkeypatch.setattr("train.arguments.world_size", lambda: processes)
    args = training_arguments(run)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == expected


@pytest.mark.parametrize(("batch", "micro"), [(10, 4), (2, 4)])
def test_a_batch_that_cannot_be_made_is_refused(
    recipe: dict[str, Any], batch: int, micro: int
) -> None:
    told = [
        f"stages.sft.batch_size={batch}",
        f"stages.sft.args.per_device_train_batch_size={micro}",
    ]
    with pytest.raises(ValueError, match=f"batch_size = {batch} is not a multiple of {micro}"):
        training_arguments(run_with(recipe, *told))


def test_the_workspace_is_where_it_writes(recipe: dict[str, Any]) -> None:
    run = run_with(recipe)
    assert Path(training_arguments(run).output_dir) == run.workspace
