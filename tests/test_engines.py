"""Two processes, gloo, batches of which some have no image: every engine gives the same run."""

from __future__ import annotations

import copy
import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from eagle_moe.build import load_model
from tests.engine_runs import (
    kill_at,
    logged,
    losses,
    make_mixed_world,
    mixed_recipe,
    run_on_two,
    seen,
    stop_at,
)
from train.recipe import Lora
from train.run import run_recipe
from train.signals import STOP_CODE
from train.workspace import last_point

DONE = [(0, ""), (0, "")]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
SHARDED = [
    "fsdp2",
    pytest.param("zero2", marks=needs_deepspeed),
    pytest.param("zero3", marks=needs_deepspeed),
]
ASKED = {"fsdp2": (0, 1), "zero2": (1,), "zero3": (0,)}
"""Which processes are told to stop."""
WRAPPED = {
    "ddp": ("DistributedDataParallel", "Tensor"),
    "fsdp2": ("FSDPModule", "DTensor"),
    "zero2": ("DeepSpeedEngine", "Tensor"),
    "zero3": ("DeepSpeedEngine", "Tensor"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_mixed_world(folder)
    return folder


@pytest.fixture(scope="module")
def reference(world: Path) -> Path:
    """Checkpoint of the run under DDP."""
    recipe = mixed_recipe(world, world / "reference", "ddp")
    assert run_on_two(recipe, world / "reference-seen") == DONE
    return world / "reference" / "sft"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def difference(one: Path, other: Path) -> float:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.mark.parametrize("engine", ["ddp", *SHARDED])
def test_a_run_that_was_killed_and_stopped_ends_as_if_it_had_not_been(
    world: Path, reference: Path, tmp_path: Path, engine: str
) -> None:
    whole, told = reference, world / "reference-seen"
    if engine != "ddp":
        whole, told = tmp_path / "whole/sft", tmp_path / "seen"
        assert run_on_two(mixed_recipe(world, whole.parent, engine), told) == DONE
    _check_watched(engine, [seen(told, rank) for rank in range(2)])

    cut = mixed_recipe(world, tmp_path / "cut", engine)
    ends = run_on_two(cut, tmp_path / "k", kill_at(2))
    assert [code for code, _ in ends] == [-signal.SIGKILL] * 2
    points = tmp_path / "cut/unfinished/sft"
    _check_point(points / "checkpoint-2")
    if engine != "ddp":  # which `test_signals` stops
        ends = run_on_two(cut, tmp_path / "k", stop_at(2, *ASKED[engine]))
        assert [code for code, _ in ends] == [STOP_CODE] * 2
        assert last_point(points) == points / "checkpoint-3"  # not one that the recipe asks for
    assert run_on_two(cut, tmp_path / "k") == DONE

    resumed = tmp_path / "cut/sft"
    assert len(losses(whole)) == 4
    assert losses(whole) == losses(resumed)
    assert logged(whole, "samples_seen") == logged(resumed, "samples_seen") == [4, 8, 12, 12]
    assert difference(whole, resumed) == 0
    assert losses(whole) == pytest.approx(losses(reference), abs=1e-5)
    assert difference(whole, reference) < 1e-5
    load_model(whole)  # strict


def _check_watched(engine: str, ranks: list[list[dict[str, Any]]]) -> None:
    base, tensor = WRAPPED[engine]
    for rows in ranks:
        told = next(row for row in rows if "wrapped" in row)
        assert base in told["bases"]
        assert told["tensor"] == tensor
        batches = rows[rows.index(told) + 1 :]
        # under ZeRO 3 a blank picture goes through both experts
        without = 2 if engine == "zero3" else 0
        assert {row["computed"] for row in batches if not row["image"]} == {without}
        assert {row["computed"] for row in batches if row["image"]} == {2}
    pairs = {(a.get("image"), b.get("image")) for a, b in zip(*ranks, strict=True)}
    assert {(True, False), (False, True), (False, False), (True, True)} <= pairs


def _check_point(point: Path) -> None:
    """What learns is there once and whole, what is frozen is not there."""
    with safe_open(point / "learning.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert any("clip" in name for name in names)
    assert not any("towers.convnext" in name for name in names)
    frozen = 326_448 * 4  # bytes of ConvNeXt
    learning = (point / "learning.safetensors").stat().st_size
    files = [path for path in point.rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 3 * learning for path in files)
    # weights, two moments, and under ZeRO a master copy and the weights again
    assert sum(path.stat().st_size for path in files) < 5 * learning + frozen // 2


# -- a step without any image


def test_a_step_without_an_image_leaves_vision_alone(world: Path, tmp_path: Path) -> None:
    """As in one process, where gradients are missing: momentum and weight decay rest."""
    # without the larger epsilon Adam makes steps of the rounding of the smallest gradients
    changes = {"batch_size": 2, "args": {"weight_decay": 0.1, "max_steps": 6, "adam_epsilon": 1e-4}}
    recipe = mixed_recipe(world, tmp_path / "two", "auto", **changes)
    assert run_on_two(recipe, tmp_path / "seen") == DONE
    rows = [[row["image"] for row in seen(tmp_path / "seen", r) if "image" in row] for r in (0, 1)]
    steps = list(zip(*rows, strict=True))
    assert (False, False) in steps[1:]

    one = mixed_recipe(world, tmp_path / "one", "auto", **changes)
    one["stages"]["sft"]["args"]["per_device_train_batch_size"] = 2
    run_recipe(one)
    assert difference(tmp_path / "one/sft", tmp_path / "two/sft") < 1e-5


# -- what goes wrong without these measures


def without_filling_in(rank: int) -> None:
    from train.engines.fsdp2 import JoiningRanks
    from train.engines.imageless import ImagelessRanks

    for kind in (ImagelessRanks, JoiningRanks):
        kind.fill_in = lambda self, embeddings: embeddings  # type: ignore[method-assign]


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero2", marks=needs_deepspeed)])
def test_without_filling_in_processes_hang_or_fail(
    world: Path, tmp_path: Path, engine: str
) -> None:
    recipe = mixed_recipe(world, tmp_path / "run", engine, args={"ddp_timeout": 4})
    ends = run_on_two(recipe, tmp_path / "seen", without_filling_in)
    assert all(code == 1 for code, _ in ends)
    said = {
        "fsdp2": "was at the language model, where not all of the others came in time",
        "zero2": "experts.clip: processes ran it a different number of times: rank",
    }
    assert any(said[engine] in message for _, message in ends)


@needs_deepspeed
def test_zero_gradients_in_another_order_go_to_other_parameters(
    world: Path, reference: Path, tmp_path: Path
) -> None:
    """Why ZeRO has to know the order: nothing fails, and the weights are others."""

    def reverse(rank: int) -> None:
        import train.engines.zero as zero

        right = zero.gradient_order
        zero.gradient_order = lambda *args: right(*args)[::-1]

    recipe = mixed_recipe(world, tmp_path / "run", "zero2")
    assert run_on_two(recipe, tmp_path / "seen", reverse) == DONE
    assert difference(tmp_path / "run/sft", reference) > 1e-4


# -- checkpoints of engines that split or round


ADAPTED = {
    "trainable": ["connector"],
    "lr": {},
    "lora": {"language_model": {"r": 2}, "experts.clip": {"r": 2}},
}


def test_adapters_are_merged_from_pieces(world: Path, tmp_path: Path) -> None:
    for engine in ("ddp", "fsdp2"):
        recipe = mixed_recipe(world, tmp_path / engine, engine, **ADAPTED)
        assert run_on_two(recipe, tmp_path / f"{engine}-seen") == DONE
    assert difference(tmp_path / "ddp/sft", tmp_path / "fsdp2/sft") < 1e-5
    assert (tmp_path / "fsdp2/sft/adapters/language_model").is_dir()


@needs_deepspeed
def test_bfloat16_under_zero_does_not_round_the_checkpoint(world: Path, tmp_path: Path) -> None:
    """Neither what learned, nor what is frozen, nor what adapters are merged into."""
    recipe = mixed_recipe(world, tmp_path / "run", "zero2", **ADAPTED, args={"bf16": True})
    assert run_on_two(recipe, tmp_path / "seen") == DONE
    saved = weights(tmp_path / "run/sft")
    learned = saved["model.multi_modal_projector.layers.0.weight"]
    assert learned.dtype == torch.float32
    assert not torch.equal(learned, learned.bfloat16().float())
    for name, value in load_file(world / "experts/convnext/expert.safetensors").items():
        assert torch.equal(saved[f"model.vision_tower.towers.convnext.{name}"], value)

    kept = load_file(tmp_path / "run/sft/adapters/language_model/adapter_model.safetensors")
    adapted = 0
    for name, value in load_file(world / "llm/model.safetensors").items():
        ours = name.replace("model.", "model.language_model.", 1)
        down = kept.get(f"base_model.model.{ours}".replace(".weight", ".lora_A.weight"))
        if down is None:
            assert torch.equal(saved[ours], value)
            continue
        up = kept[f"base_model.model.{ours}".replace(".weight", ".lora_B.weight")]
        scale = Lora(r=2).alpha / 2
        torch.testing.assert_close(saved[ours], value + scale * up @ down, atol=1e-6, rtol=0)
        adapted += not torch.equal(saved[ours], value)
    assert adapted == 7


# -- resume points belong to an engine and a number of processes


@pytest.fixture(scope="module")
def unfinished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Recipe of a run under DDP that was killed after two steps. No test changes its folder."""
    folder = tmp_path_factory.mktemp("unfinished")
    recipe = mixed_recipe(world, folder / "run", "ddp")
    run_on_two(recipe, folder / "seen", kill_at(2))
    return recipe


def test_another_engine_or_number_of_processes_cannot_continue(
    unfinished: dict[str, Any], tmp_path: Path
) -> None:
    point = Path(unfinished["output_dir"], "unfinished/sft/checkpoint-2")
    assert json.loads((point / "engine.json").read_text()) == {"engine": "ddp", "processes": 2}
    with pytest.raises(ValueError, match=r"checkpoint-2: .*engine ddp -> .*processes 2 -> 1"):
        run_recipe(unfinished)
    ends = run_on_two({**unfinished, "engine": "fsdp2"}, tmp_path)
    assert all("engine ddp -> fsdp2" in message for _, message in ends)


def test_another_recipe_cannot_continue(unfinished: dict[str, Any], tmp_path: Path) -> None:
    """Every process says so, and none waits for another."""
    other = copy.deepcopy(unfinished)
    other["stages"]["sft"]["args"]["learning_rate"] = 2e-3
    for code, message in run_on_two(other, tmp_path):
        assert code == 1
        assert "checkpoint-2: an unfinished run with other settings" in message
        assert "args.learning_rate: 0.001 -> 0.002" in message
