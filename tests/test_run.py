from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from eagle_moe.build import load_model
from eagle_moe.checkpoint import SaveFailed, read_complete, read_provenance
from eagle_moe.processor import EagleMixProcessor
from tests.tiny_run import make_recipe, make_world, recipe_in
from train.progress import ProgressReport
from train.recipe import parse_recipe
from train.run import main, run_recipe, run_stage


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """Output folder of a recipe of which all stages were run in one call."""
    run_recipe(make_recipe(world))
    return world / "run"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


def in_child(call: Callable[[], object]) -> int:
    """Exit code of a forked process that makes `call` (negative: killed by that signal)."""
    child = multiprocessing.get_context("fork").Process(target=call)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def test_every_run_ends_in_a_whole_checkpoint(finished: Path) -> None:
    folders = ["pre_align/clip", "pre_align/convnext", "align", "sft"]
    for name in folders:
        complete = read_complete(finished / name)
        assert complete is not None
        assert "/".join(filter(None, (complete.stage, complete.expert))) == name
    assert sorted(path.name for path in finished.iterdir()) == ["align", "pre_align", "sft"]


def test_a_checkpoint_loads_strictly_and_says_where_its_parts_come_from(finished: Path) -> None:
    model = load_model(finished / "sft")
    records = read_provenance(finished / "sft")
    assert list(records) == ["experts.clip", "experts.convnext", "connector", "language_model"]
    assert records["experts.clip"].history[1:] == ["pre_align/clip", "sft"]
    assert records["connector"].history == ["random, seed 42", "align", "sft"]
    assert sum(r.parameters for r in records.values()) == sum(p.numel() for p in model.parameters())


def test_a_frozen_part_has_the_same_hash_in_every_stage(finished: Path) -> None:
    hashes = {
        name: read_provenance(finished / name)["language_model"].sha256
        for name in ("pre_align/clip", "pre_align/convnext", "align")
    }
    assert len(set(hashes.values())) == 1
    assert read_provenance(finished / "sft")["language_model"].sha256 not in hashes.values()


def test_the_resolved_recipe_in_a_checkpoint_is_the_recipe(world: Path, finished: Path) -> None:
    saved = yaml.safe_load((finished / "sft" / "recipe.yaml").read_text())
    assert parse_recipe(saved, "saved") == parse_recipe(make_recipe(world), "given")


def test_stages_one_by_one_equal_all_at_once(world: Path, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_in(world, tmp_path / "run"), sort_keys=False))
    for stage in ("pre_align", "align", "sft"):
        assert main([str(path), "--stage", stage]) == 0
    for name in ("pre_align/clip", "pre_align/convnext", "align", "sft"):
        assert_same(tmp_path / "run" / name, finished / name)


def test_experts_of_a_fan_out_can_be_run_apart(world: Path, finished: Path, tmp_path: Path) -> None:
    recipe = recipe_in(world, tmp_path / "run")
    folder = run_stage(recipe, "pre_align", expert="convnext")
    assert folder == tmp_path / "run/pre_align/convnext"
    assert not (tmp_path / "run/pre_align/clip").exists()
    assert_same(folder, finished / "pre_align/convnext")


def test_what_is_finished_is_not_done_again(
    world: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert run_recipe(make_recipe(world)) == finished / "sft"
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert capsys.readouterr().out.count("finished before") == 4


def test_what_only_changes_logs_does_not_count(world: Path, finished: Path) -> None:
    run_recipe(make_recipe(world), ["stages.sft.args.logging_steps=3"], stage="sft")


def test_changed_settings_are_refused_by_name_until_told_to_redo(
    world: Path, tmp_path: Path
) -> None:
    recipe = recipe_in(world, tmp_path / "run", trainable=["connector"], lr={}, eval=None)
    folder = run_recipe(recipe)
    old = weights(folder)
    change = ["stages.sft.args.learning_rate=0.5"]
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 -> 0.5"):
        run_recipe(recipe, change)
    assert all(torch.equal(old[name], value) for name, value in weights(folder).items())
    run_recipe(recipe, change, redo=True)
    assert any(not torch.equal(old[name], value) for name, value in weights(folder).items())


def test_the_curve_has_every_skill_at_every_evaluation(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "sft/curve.jsonl").read_text().splitlines()]
    assert [(row["step"], row["skill"], row["n"]) for row in rows] == [
        (step, skill, count)
        for step in (2, 3)
        for skill, count in (("total", 6), ("warm", 2), ("cold", 4))
    ]


def test_a_killed_run_continues_to_the_same_weights(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(world, tmp_path / "run")
    recipe["stages"]["sft"]["init_from"] = [str(finished / "align")]
    on_step_end = ProgressReport.on_step_end

    def kill_in_step_three(self: ProgressReport, args: Any, state: Any, *rest: Any, **kw: Any):
        on_step_end(self, args, state, *rest, **kw)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressReport, "on_step_end", kill_in_step_three)
        assert in_child(lambda: run_recipe(recipe, stage="sft")) == -signal.SIGKILL
    unfinished = tmp_path / "run/unfinished/sft"
    assert [path.name for path in unfinished.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "run/sft").exists()
    run_recipe(recipe, stage="sft")
    assert_same(tmp_path / "run/sft", finished / "sft")
    assert not unfinished.exists()
    curves = [folder / "sft/curve.jsonl" for folder in (tmp_path / "run", finished)]
    assert curves[0].read_text() == curves[1].read_text()


def test_a_full_disk_at_the_end_loses_nothing(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(world, tmp_path / "run")
    recipe["stages"]["align"]["init_from"] = [str(finished / "pre_align")]

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(EagleMixProcessor, "save_pretrained", no_room)
        with pytest.raises(SaveFailed, match="align: no room to save it"):
            run_recipe(recipe, stage="align")
    assert not (tmp_path / "run" / "align").exists()
    run_recipe(recipe, stage="align")
    assert_same(tmp_path / "run" / "align", finished / "align")


def test_a_lora_stage_trains_adapters_only_and_ends_in_a_plain_model(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    lora = {"language_model": {"r": 2, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}}
    recipe = recipe_in(world, tmp_path / "run", trainable=[], lora=lora, lr={}, eval=None)
    recipe["stages"]["sft"]["init_from"] = [str(finished / "align")]
    folder = run_recipe(recipe)
    old, new = weights(finished / "align"), weights(folder)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"q_proj", "v_proj"}
    assert read_provenance(folder)["language_model"].history[-1] == "sft (LoRA)"

    model = load_model(finished / "align")
    names = [name for name, _ in model.named_parameters()]
    merged = PeftModel.from_pretrained(model, str(folder / "adapters" / "language_model"))
    merged = dict(merged.merge_and_unload().named_parameters())
    for name in names:
        torch.testing.assert_close(merged[name], new[name], atol=1e-6, rtol=1e-5)


def test_kept_features_train_the_same_weights(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"trainable": ["connector", "language_model"], "lr": {}}
    plain = recipe_in(world, tmp_path / "plain", **changes)
    kept = recipe_in(world, tmp_path / "kept", **changes, cache_features=True)
    for recipe in (plain, kept):
        recipe["stages"]["sft"]["init_from"] = [str(finished / "align")]
    one, other = weights(run_recipe(plain)), weights(run_recipe(kept))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3)
    curves = [tmp_path / name / "sft" / "curve.jsonl" for name in ("plain", "kept")]
    assert curves[0].read_text() == curves[1].read_text()
    # a second run with the same experts finds its maps
    monkeypatch.setattr("train.features._run", lambda *_: pytest.fail("computed again"))
    kept |= {"output_dir": str(tmp_path / "again"), "features_dir": str(tmp_path / "kept/features")}
    assert_same(run_recipe(kept), tmp_path / "kept" / "sft")


def test_mixed_precision_does_not_round_what_is_frozen(world: Path, tmp_path: Path) -> None:
    told = [
        "frozen_dtype=bfloat16",
        "stages.align.args.bf16=true",
        "stages.align.args.use_cpu=true",
    ]
    told += ["stages.pre_align.frozen_dtype=float32", "stages.sft.frozen_dtype=float32"]
    recipe = {**make_recipe(world), "output_dir": str(tmp_path / "run")}
    experts = run_recipe(recipe, told, stage="pre_align")
    align = run_recipe(recipe, told, stage="align")
    assert {value.dtype for value in weights(align).values()} == {torch.float32}
    assert load_model(align).dtype == torch.float32
    before, after = read_provenance(experts / "clip"), read_provenance(align)
    for part in ("experts.clip", "language_model"):
        assert before[part].sha256 == after[part].sha256
    assert after["connector"].history[-1] == "align"


def test_experts_without_clip_or_convnext(tmp_path: Path) -> None:
    recipe = make_world(tmp_path, ("sam", "pix2struct"))
    recipe["stages"]["sft"]["lr"] = {}
    del recipe["stages"]["align"]
    folder = run_recipe(recipe, ["stages.sft.init_from=[pre_align]", "stages.sft.eval=null"])
    assert list(read_provenance(folder))[:2] == ["experts.sam", "experts.pix2struct"]


def test_lists_stages_and_their_state(
    world: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(make_recipe(world), sort_keys=False))
    assert main([str(path), "--list"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("finished") == 4 and "pre_align/convnext" in shown
