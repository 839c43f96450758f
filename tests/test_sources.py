from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_moe.checkpoint import (
    Complete,
    PartRecord,
    write_checkpoint,
    write_json,
    write_provenance,
)
from eagle_moe.parts import all_parts
from tests.tiny_run import make_recipe, make_world
from train.recipe import parse_recipe
from train.sources import Origin, check_sources, find_origins, run_identity
from train.stages import StageRun, stage_runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def fake(folder: Path, experts: Sequence[str], digest: str = "00") -> Path:
    """A complete checkpoint without weights."""
    with write_checkpoint(folder, Complete(stage="x", identity={})) as draft:
        write_json(draft / "config.json", {})
        record = PartRecord(sha256=digest, parameters=1, history=["somewhere"])
        write_provenance(draft, dict.fromkeys(all_parts(experts), record))
    return folder


def run_of(
    world: Path, out: Path, stage: str, *overrides: str, expert: str | None = None
) -> StageRun:
    recipe = parse_recipe({**make_recipe(world), "output_dir": str(out)}, "recipe", overrides)
    return stage_runs(recipe, stage, expert)[0]


def places(run: StageRun) -> dict[str, str]:
    return {part: origin.place for part, origin in find_origins(run).items()}


def test_without_sources_all_comes_from_init(world: Path, tmp_path: Path) -> None:
    assert places(run_of(world, tmp_path, "pre_align", expert="convnext")) == {
        "experts.convnext": str(world / "experts/convnext"),
        "connector": "random",
        "language_model": str(world / "llm"),
    }


def test_a_fan_out_gives_its_experts_and_not_its_connectors(world: Path, tmp_path: Path) -> None:
    for name in ("clip", "convnext"):
        fake(tmp_path / "pre_align" / name, [name])
    assert places(run_of(world, tmp_path, "align")) == {
        "experts.clip": str(tmp_path / "pre_align/clip"),
        "experts.convnext": str(tmp_path / "pre_align/convnext"),
        "connector": "random",
        "language_model": str(world / "llm"),
    }


def test_a_fan_out_of_another_run_is_given_as_a_folder(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "pre_align"
    for name in ("clip", "convnext", "sam"):
        fake(other / name, [name])
    run = run_of(world, tmp_path, "align", f"stages.align.init_from=[{other}]")
    assert places(run)["experts.convnext"] == str(other / "convnext")


def test_later_entries_override_part_by_part(world: Path, tmp_path: Path) -> None:
    whole = fake(tmp_path / "whole", ["clip", "convnext"])
    other = fake(tmp_path / "other", ["clip", "sam"])
    entry = f"stages.sft.init_from=[{whole}, {{checkpoint: {other}, parts: [experts.clip]}}]"
    assert places(run_of(world, tmp_path, "sft", entry)) == {
        "experts.clip": str(other),
        "experts.convnext": str(whole),
        "connector": str(whole),
        "language_model": str(whole),
    }


def test_one_expert_of_a_mixture_goes_on_with_a_new_connector(world: Path, tmp_path: Path) -> None:
    whole = fake(tmp_path / "whole", ["clip", "convnext"])
    entry = f"stages.pre_align.init_from=[{whole}]"
    assert places(run_of(world, tmp_path, "pre_align", entry, expert="clip")) == {
        "experts.clip": str(whole),
        "connector": "random",
        "language_model": str(whole),
    }


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{other}", "holds experts.clip, experts.sam, connector, language_model, but the model"),
        ("{{checkpoint: {other}, parts: [experts.convnext]}}", "does not hold experts.convnext"),
        ("gone/for/good", "gone/for/good does not exist"),
        ("{plain}", "is not a complete checkpoint"),
    ],
)
def test_what_does_not_fit_is_named(world: Path, tmp_path: Path, entry: str, said: str) -> None:
    other = fake(tmp_path / "other", ["clip", "sam"])
    (tmp_path / "plain").mkdir()
    told = entry.format(other=other, plain=tmp_path / "plain")
    run = run_of(world, tmp_path, "sft", f"stages.sft.init_from=[{told}]")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        find_origins(run)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        check_sources([run])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("{folder}/text.pth", "text.pth: neither a file of torch.save"),
        ("{folder}/sam.pth", "sam.pth: not what the expert `clip` .* can start from"),
        ("{folder}/half.pth", r"half.pth \(an expert's weights .* nothing in the file for: "),
        ("{folder}/gone.pth", "init.experts.clip: no folder or file .*gone.pth, nor is it a Hub"),
        ("pretrained", "expert `clip`: its card names no checkpoint"),
    ],
)
def test_a_wrong_original_is_refused_before_anything_is_spent(
    world: Path, tmp_path: Path, place: str, said: str
) -> None:
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"image_encoder.pos_embed": torch.zeros(1)}, tmp_path / "sam.pth")
    torch.save({"pre_layernorm.weight": torch.zeros(96)}, tmp_path / "half.pth")
    start = f"init.experts.clip={place.format(folder=tmp_path)}"
    run = run_of(world, tmp_path / "out", "sft", "stages.sft.init_from=[]", start)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        check_sources([run])


def test_what_is_on_the_hub_waits_for_its_turn(world: Path, tmp_path: Path) -> None:
    start = "init.experts.clip=openai/clip-vit-large-patch14-336"
    check_sources([run_of(world, tmp_path, "sft", "stages.sft.init_from=[]", start)])


def test_an_original_counts_by_content(world: Path, tmp_path: Path) -> None:
    weights = load_file(world / "experts/clip/expert.safetensors")

    def identity(path: Path) -> Any:
        start = f"init.experts.clip={path}"
        run = run_of(world, tmp_path / "out", "sft", "stages.sft.init_from=[]", start)
        return run_identity(run, find_origins(run))["weights.experts.clip"]

    for name in ("one.safetensors", "same.safetensors"):
        save_file(weights, tmp_path / name)
    weights["pre_layernorm.weight"][0] += 1
    save_file(weights, tmp_path / "other.safetensors")
    one, same, other = (identity(tmp_path / f"{n}.safetensors") for n in ("one", "same", "other"))
    assert one == same != other


def test_what_a_run_will_make_counts_as_there(world: Path, tmp_path: Path) -> None:
    recipe = run_of(world, tmp_path, "sft").recipe
    check_sources([run for name in recipe.stages for run in stage_runs(recipe, name)])
    with pytest.raises(FileNotFoundError, match=r"init_from: pre_align: .*does not exist"):
        check_sources(stage_runs(recipe, "align"))


def test_the_identity_is_of_contents_not_of_names(world: Path, tmp_path: Path) -> None:
    def identity(*overrides: str, digest: str = "00") -> dict[str, Any]:
        for name in ("clip", "convnext"):
            fake(tmp_path / "out" / "pre_align" / name, [name], digest)
        run = run_of(world, tmp_path / "out", "align", *overrides)
        return run_identity(run, find_origins(run))

    base = identity()
    assert identity("name=renamed", "stages.align.args.logging_steps=5") == base
    assert identity("stages.sft.batch_size=6") == base
    assert identity("stages.align.on_nonfinite=skip", "peak_tflops=790") == base
    for change in ("seed=1", "stages.align.batch_size=4", "model.fusion.grid=4", "dtype=bfloat16"):
        assert identity(change) != base
    assert identity(digest="01") != base
    captions = world / "captions.jsonl"
    before = captions.read_text()
    captions.write_text(before.replace("red", "rod"))
    assert identity()["data.captions.content"] != base["data.captions.content"]
    captions.write_text(before)
    shutil.rmtree(tmp_path / "out")


def test_a_resume_point_is_no_source(world: Path, tmp_path: Path) -> None:
    point = tmp_path / "other/unfinished/sft/checkpoint-9"
    with write_checkpoint(point, Complete(stage="sft", identity={})) as draft:
        write_json(draft / "trainer_state.json", {})
    with pytest.raises(ValueError, match=r"checkpoint-9: a resume point of an unfinished run"):
        find_origins(run_of(world, tmp_path, "sft", f"stages.sft.init_from=[{point}]"))


def test_a_checkpoint_of_another_recipe_is_held_to_this_model(world: Path, tmp_path: Path) -> None:
    other = fake(tmp_path / "other", ["clip", "sam"])
    with pytest.raises(ValueError, match=r"holds experts.clip, experts.sam, .*but the model has"):
        find_origins(run_of(world, tmp_path, "sft", f"stages.sft.init_from=[{other}]"))


def test_an_expert_may_start_from_a_checkpoint_that_holds_it(world: Path, tmp_path: Path) -> None:
    fake(tmp_path / "store", ["clip"])
    start = f"init.experts.clip={tmp_path}/store"
    run = run_of(world, tmp_path / "out", "sft", "stages.sft.init_from=[]", start)
    assert find_origins(run)["experts.clip"] == Origin("checkpoint", f"{tmp_path}/store")
    wrong = f"init.experts.convnext={tmp_path}/store"
    with pytest.raises(ValueError, match=r"init.experts.convnext: .* and not this expert"):
        find_origins(run_of(world, tmp_path / "out", "sft", "stages.sft.init_from=[]", wrong))


def test_what_a_promised_stage_gives_is_called_by_its_name(world: Path, tmp_path: Path) -> None:
    origins = find_origins(run_of(world, tmp_path, "align"), promised=["pre_align"])
    assert origins["experts.clip"] == Origin("promised", "pre_align")
    assert origins["connector"].kind == "random"
