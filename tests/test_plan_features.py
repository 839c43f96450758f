"""train/plan: sizes, gains and refusals follow from figures that can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eagle_moe.build import build_config
from eval.page import show_bytes, show_seconds
from tests.tiny_run import make_world
from train.data.write_shards import write_shards
from train.flops import model_flops
from train.plan.disk import Disk, measure_disk
from train.plan.features import ExpertMaps, FeaturePlan, main, plan_features
from train.plan.images import count_visits
from train.plan.maps import counted_seconds, map_shapes, timed_seconds
from train.recipe import load_recipe, parse_recipe
from train.run import run_stage
from train.stages import StageRun, stage_runs

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
FULL = RECIPES / "eagle-x5-vicuna-7b.yaml"
RELEASED = ("stages.align.trainable=[connector]", "stages.align.lr={}")
"""The released script leaves the experts frozen while it aligns."""
CELLS = {"clip": 24**2, "convnext": 32**2, "sam": 32**2, "eva02": 64**2, "pix2struct": 45**2}
CHANNELS = {"clip": 1024, "convnext": 3072, "sam": 1024, "eva02": 1024, "pix2struct": 1536}
FAST = Disk(Path("store"), read=2e9, write=2e9, free=10**14)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return make_world(tmp_path)


def run_of(recipe: dict[str, Any], stage: str = "align") -> StageRun:
    return StageRun(parse_recipe(recipe, "test"), stage)


def on_h100(_: Any, tflops: float) -> dict[str, float]:
    """Milliseconds on a card that does 790 TFLOP/s, from FLOPs that were counted elsewhere."""
    counted = {"clip": 0.48, "convnext": 8.02, "sam": 3.59, "eva02": 3.92, "pix2struct": 3.14}
    return {name: value / 1000 * 790 / tflops for name, value in counted.items()}


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """To count at full size takes many seconds; tests/test_flops.py does."""
    monkeypatch.setattr("train.plan.features.counted_seconds", on_h100)


def full_run(*overrides: str) -> StageRun:
    (run,) = stage_runs(load_recipe(FULL, [*RELEASED, *overrides]), "align")
    return run


def make_plan(**changes: Any) -> FeaturePlan:
    """1,000 images of 1 MB, 10 ms each, 5 passes; 100 MB/s to read, 50 to write."""
    fields = {"size": 10**6, "seconds": 0.01, "passes": 5.0} | changes
    disk = Disk(Path("store"), read=1e8, write=5e7, free=fields.pop("free", 10**10))
    maps = ExpertMaps("clip", (1, 1, 250_000), **fields)
    return FeaturePlan("align", 1_000, (maps,), disk)


# Full size


@pytest.mark.usefixtures("h100")
def test_full_size_maps_are_as_large_as_worked_out_elsewhere() -> None:
    plan = plan_features(full_run(), images=558_128, tflops=790, disk=FAST)
    assert {each.name: each.shape[0] for each in plan.experts} == CHANNELS
    # 15.7 MB per image in bfloat16, 8.8 TB for LLaVA-Pretrain: once all are on the 32 x 32 grid
    on_grid = sum(each.shape[0] * 1024 * 2 for each in plan.experts)
    assert show_bytes(on_grid) == "15.7 MB"
    assert show_bytes(on_grid * plan.images) == "8.78 TB"
    # they are kept as they come out of the experts, which is more
    by_hand = sum(CHANNELS[name] * CELLS[name] * 2 for name in CELLS)
    assert plan.image_bytes == by_hand == pytest.approx(24.18e6, rel=1e-3)
    assert plan.total_bytes == 558_128 * by_hand


@pytest.mark.usefixtures("h100")
def test_full_size_pays_after_passes_not_in_one() -> None:
    half = {"tflops": 395.0, "images": 558_128, "disk": FAST}
    once = plan_features(full_run(), **half)
    assert once.refusal is not None and "does not pay" in once.refusal
    assert once.experts[0].passes == 1  # one epoch
    assert plan_features(full_run("stages.align.args.num_train_epochs=3"), **half).refusal is None
    # a search: the base in every mixture, the others in few
    runs = {"clip": 11, "convnext": 11, "sam": 4, "eva02": 8, "pix2struct": 5}
    search = plan_features(full_run(), runs=runs, **half)
    assert {each.name: each.passes for each in search.experts} == runs
    assert search.refusal is None
    assert search.gain > 1.5
    small = Disk(Path("store"), 2e9, 2e9, free=2 * 10**12)
    refused = plan_features(full_run(), runs=runs, **half | {"disk": small})
    assert refused.refusal == "does not fit: store has 2 TB free for 13.5 TB"


@pytest.mark.usefixtures("h100")
def test_float32_takes_twice_the_room() -> None:
    options = {"images": 10, "tflops": 100.0, "disk": FAST}
    narrow, wide = (
        plan_features(full_run(f"frozen_dtype={dtype}"), **options)
        for dtype in ("bfloat16", "float32")
    )
    assert wide.image_bytes == 2 * narrow.image_bytes


# The arithmetic


def test_gain_by_hand() -> None:
    plan = make_plan()
    assert plan.seconds_without == pytest.approx(5 * 10)
    assert plan.seconds_filling == pytest.approx(10 + 20)
    assert plan.seconds_reading == pytest.approx(5 * 10)
    assert plan.gain == pytest.approx(50 / 80)
    assert plan.refusal == (
        "does not pay: 50 s to compute the maps whenever they are needed, 30 s to compute and "
        "write them once and 50 s to read them, which is 0.62 x as fast where 1.1 is the least; "
        "reading is too slow for it to pay after any number of passes"
    )


def test_the_passes_that_are_named_are_enough_and_fewer_are_not() -> None:
    refusal = make_plan(seconds=0.05, passes=0.5).refusal
    assert refusal is not None and "does not pay" in refusal
    needed = float(refusal.split("it pays from ")[1].split(" x")[0]) * 0.5
    assert make_plan(seconds=0.05, passes=1.05 * needed).refusal is None
    assert make_plan(seconds=0.05, passes=0.95 * needed).refusal is not None


def test_what_pays_must_also_fit() -> None:
    assert make_plan(seconds=1.0).refusal is None
    assert "x as fast: " in make_plan(seconds=1.0).told
    full = make_plan(seconds=1.0, free=999_999_999)
    assert full.refusal == "does not fit: store has 1 GB free for 1 GB"
    assert "refused, as it does not fit" in full.told


# What is counted and measured


def test_seconds_follow_from_operations(recipe: dict[str, Any]) -> None:
    config = build_config(run_of(recipe).model_spec, 3)
    flops = model_flops(config).image
    seconds = counted_seconds(config, tflops=2e-3)
    assert seconds == {name: flops[f"experts.{name}"] / 2e9 for name in ("clip", "convnext")}


def test_maps_are_as_large_as_what_the_store_writes(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["stages"] = {"align": recipe["stages"]["align"] | {"init_from": None}}
    recipe["stages"]["align"]["cache_features"] = True
    recipe["init"]["language_model"] = str(tmp_path / "llm")
    run = run_of(recipe)
    plan = plan_features(run, tflops=1.0, disk=FAST)
    run_stage(recipe, "align")
    files = list(run.features.glob("*/maps.bin"))
    assert len(files) == len(plan.experts) == 2
    written = {path.parent.name.split("-")[0]: path.stat().st_size for path in files}
    assert written == {each.name: each.size * plan.images for each in plan.experts}
    shapes = {
        path.parent.name.split("-")[0]: json.loads((path.parent / "shape.json").read_text())
        for path in files
    }
    assert {n: tuple(s["shape"]) for n, s in shapes.items()} == map_shapes(
        build_config(run.model_spec, 3)
    )


def test_images_and_passes_are_counted(recipe: dict[str, Any]) -> None:
    align, sft = run_of(recipe), run_of(recipe, "sft")
    assert count_visits(align).images == 8
    assert count_visits(align).passes == 2 * 2 / 8  # two steps of two samples
    recipe["stages"]["align"]["args"] = {"num_train_epochs": 3, "report_to": "none"}
    assert count_visits(run_of(recipe)).passes == 3
    # six of the pictures of `questions` are asked about after two steps and at the end
    assert count_visits(sft).images == 12
    assert count_visits(sft).passes == (3 * 2 + 2 * 6) / 12


def test_weights_of_data_sets_count(recipe: dict[str, Any]) -> None:
    recipe["data"]["captions"]["weight"] = 0.5
    recipe["data"]["blind"] = recipe["data"]["captions"] | {"images": "drop", "weight": 1.5}
    recipe["stages"]["align"] |= {"data": ["captions", "blind"]}
    recipe["stages"]["align"]["args"] = {"num_train_epochs": 4, "report_to": "none"}
    visits = count_visits(run_of(recipe))
    assert (visits.images, visits.passes) == (8, 4 * 0.5)


def test_a_stage_whose_experts_learn_is_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stages\.sft: experts\.clip, experts\.convnext learn"):
        plan_features(run_of(recipe, "sft"), disk=FAST)
    recipe["stages"]["align"]["lora"] = {"experts.clip": {"r": 2}}
    with pytest.raises(ValueError, match=r"stages\.align: experts\.clip learn there"):
        plan_features(run_of(recipe), disk=FAST)


def test_what_cannot_be_known_is_asked_for(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 steps long.*Give the passes too"):
        plan_features(run_of(recipe), images=100, tflops=1.0, disk=FAST)
    plan = plan_features(run_of(recipe), images=100, passes=3, tflops=1.0, disk=FAST)
    assert plan.experts[0].passes == 3
    write_shards(str(tmp_path / "captions.jsonl"), tmp_path / "shards", None, per_shard=4)
    recipe["data"]["captions"] = {"path": str(tmp_path / "shards")}
    with pytest.raises(ValueError, match="takes none from shards"):
        count_visits(run_of(recipe))
    (tmp_path / "none.jsonl").write_text("")
    recipe["data"]["captions"] = {"path": str(tmp_path / "gone.jsonl")}
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        count_visits(run_of(recipe))


def test_data_without_an_image_has_no_maps(recipe: dict[str, Any]) -> None:
    recipe["data"]["captions"]["images"] = "drop"
    with pytest.raises(ValueError, match=r"stages\.align: no image in captions"):
        count_visits(run_of(recipe))


def test_experts_and_disk_are_measured_here(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(recipe)
    seconds = timed_seconds(build_config(run.model_spec, 3), dtype=_float32())
    assert set(seconds) == {"clip", "convnext"}
    assert all(0 < value < 1 for value in seconds.values())
    before = sorted(tmp_path.iterdir())
    disk = measure_disk(tmp_path / "not" / "there", piece=100_000)
    assert sorted(tmp_path.iterdir()) == before  # nothing is left
    assert disk.read > 1e6 and disk.write > 1e6
    assert disk.free > 0


def _float32() -> Any:
    import torch

    return torch.float32


# The command


def test_the_command_prints_the_plan(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    elsewhere = ["--tflops", "1e-6", "--disk", "1", "--free", "100"]
    assert main([str(path), "--passes", "20", *elsewhere]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "align: feature cache of 8 images" in said and "x as fast" in said
    assert "sft" not in said  # where experts learn
    assert main([str(path), *elsewhere]) == 1
    assert "refused, as it does not pay" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--stage", "sft"], "a feature cache is for stages that leave all experts frozen"),
        (["--stage", "algn"], 'no stage "algn". Did you mean "align"?'),
        (["--passes", "0"], "--passes 0: give a number above 0."),
        (["--images", "-1"], "--images -1: give a number above 0."),
        (["--disk", "1"], "give both or neither"),
        (["stages.align.trainable=[experts]"], "experts learn in every stage"),
    ],
)
def test_mistakes_are_explained(
    recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert main([str(path), *arguments]) == 2
    assert complaint.lower() in capsys.readouterr().err.lower()


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (15.73e6, "15.7 MB"),
        (8.78e12, "8.78 TB"),
        (24_600, "24.6 kB"),
        (999.6e6, "1 GB"),
        (7, "7 B"),
    ],
)
def test_bytes_are_readable(count: float, shown: str) -> None:
    assert show_bytes(count) == shown


def test_long_times_are_readable() -> None:
    assert show_seconds(3599.4) == "59 min 59 s"
    assert show_seconds(3600) == "1 h 00 min"
    assert show_seconds(59 * 3600 + 56 * 60) == "59 h 56 min"
