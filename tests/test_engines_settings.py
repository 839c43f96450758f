from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from tests.tiny_run import make_recipe, make_world
from train.arguments import training_arguments
from train.engines import ENGINES, Engine, make_engine
from train.engines.zero import CONFIGS, Zero
from train.recipe import parse_recipe
from train.sources import find_origins, run_identity
from train.stages import StageRun


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return make_recipe(folder)


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-5,
        use_cpu=True,
        report_to="none",
    )


def settings(tmp_path: Path, **changes: Any) -> Zero:
    """ZeRO by the settings of `zero2`, with some of them changed."""
    path = tmp_path / "my.json"
    given = json.loads((CONFIGS / "zero2.json").read_text(encoding="utf-8"))
    path.write_text(json.dumps({**given, **changes}))
    return Zero(str(path), path)


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_the_settings_that_we_ship_contradict_nothing(name: str, args: TrainingArguments) -> None:
    engine = Zero(name, CONFIGS / f"{name}.json")
    engine.check(args, "float32")
    assert engine.settings["gradient_clipping"] == "auto"  # absent, it would be off
    assert engine.stage == int(name[4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_clipping": 0.5}, r"gradient_clipping = 0.5 contradicts args.max_grad_norm = 1"),
        ({"gradient_clipping": None}, r"gradient_clipping = nothing, .* args.max_grad_norm = 1"),
        ({"train_batch_size": 64}, r"train_batch_size = 64 contradicts batch_size = 8"),
        (
            {"gradient_accumulation_steps": 1},
            r"gradient_accumulation_steps = 1 contradicts args.gradient_accumulation_steps = 2",
        ),
        (
            {"train_micro_batch_size_per_gpu": 8},
            r"= 8 contradicts args.per_device_train_batch_size = 4",
        ),
        ({"bf16": {"enabled": True}}, r"bf16.enabled = True contradicts args.bf16 = False"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled = True contradicts args.fp16 = False"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}},
            r'optimizer .*"lr": 0.0001.*args.learning_rate = 2e-05',
        ),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler .*Leave the section out"),
        ({"bf16": {"enabled": "auto", "check_grad_overflow": False}}, r"reach the weights. Leave"),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            r"zero_optimization.compute_grad_norm = false: .* not finite",
        ),
    ],
)
def test_settings_that_contradict_the_stage_are_refused(
    tmp_path: Path, args: TrainingArguments, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as told:
        settings(tmp_path, **changes).check(args, "float32")
    assert "my.json" in str(told.value)


def test_settings_that_agree_with_the_stage_are_taken(
    tmp_path: Path, args: TrainingArguments
) -> None:
    settings(tmp_path, gradient_clipping=1.0, train_batch_size=8).check(args, "float32")


def test_weights_in_bfloat16_need_bf16(tmp_path: Path, args: TrainingArguments) -> None:
    with pytest.raises(ValueError, match="dtype = bfloat16 needs args.bf16"):
        settings(tmp_path).check(args, "bfloat16")


def test_a_deepspeed_that_loses_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deepspeed = pytest.importorskip("deepspeed")
    settings(tmp_path).arguments()
    monkeypatch.setattr(deepspeed, "__version__", "0.18.4")
    with pytest.raises(ValueError, match=r"DeepSpeed 0.18.4 takes steps .*deepspeed>=0.19.8"):
        settings(tmp_path).arguments()


def test_settings_without_a_stage_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"odd.json: zero_optimization.stage = None"):
        Zero("odd.json", path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"odd.json: cannot be read"):
        Zero("odd.json", path)


def test_a_stage_overrides_the_engine_of_the_recipe(recipe: dict[str, Any]) -> None:
    told = ["engine=zero2", "stages.align.engine=ddp"]
    parsed = parse_recipe(recipe, "recipe", told)
    assert [StageRun(parsed, name).engine for name in ("align", "sft")] == ["ddp", "zero2"]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("zero1", 'stages.pre_align: engine: no engine "zero1".*zero2'),
        ("my.json", "no file my.json"),
    ],
)
def test_an_engine_that_is_not_there_is_refused(
    recipe: dict[str, Any], engine: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe, "recipe", [f"engine={engine}"])


def test_the_engine_is_chosen_by_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert type(make_engine("auto")) is Engine
    for name in sorted(set(ENGINES) - {"auto", "ddp"}):
        with pytest.raises(ValueError, match=f"engine: {name}: start it with torchrun"):
            make_engine(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [make_engine(name).name for name in ("auto", "fsdp2")] == ["ddp", "fsdp2"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.muon=true", "stages.sft: muon needs whole matrices, and engine: split"),
        (
            "stages.sft.lora={language_model: {quantize: nf4}}",
            "stages.sft: lora: quantize: .* engine: split splits or rounds",
        ),
    ],
)
def test_what_needs_whole_tensors_is_refused_where_they_are_split(
    recipe: dict[str, Any], override: str, message: str
) -> None:
    class Split(Engine):
        name = "split"
        splits_weights = splits_optimizer = True

    told = [override, "stages.sft.trainable=[connector]", "stages.sft.lr={}"]
    run = StageRun(parse_recipe(recipe, "recipe", told), "sft")
    with pytest.raises(ValueError, match=message):
        training_arguments(run, Split())
    training_arguments(run)


def test_processes_count_for_a_result_where_they_make_the_batch(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def identities(*told: str) -> list[dict[str, Any]]:
        run = StageRun(parse_recipe(recipe, "recipe", told), "pre_align", "clip")
        found = []
        for processes in (1, 8):
            monkeypatch.setattr("train.sources.world_size", lambda n=processes: n)
            found.append(run_identity(run, find_origins(run)))
        return found

    one, eight = identities()  # with a batch_size
    assert one == eight == identities("engine=zero2")[0]
    one, eight = identities("stages.pre_align.batch_size=null")
    assert (one.pop("processes"), eight.pop("processes")) == (1, 8)
    assert one == eight
