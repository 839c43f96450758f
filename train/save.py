"""The end of a run: model, processor, recipe, provenance and logs become one checkpoint folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import Tensor

from eagle_moe.checkpoint import RECIPE, Complete, PartRecord, write_checkpoint, write_provenance
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import model_tensors, part_hashes, part_of, tensor_hashes
from eagle_moe.processor import EagleMixProcessor
from train.curve import CURVE
from train.engines import Engine
from train.health import HEALTH
from train.learning import learning_parts
from train.lora import merge_lora
from train.resume import changing_names
from train.sources import Origin
from train.stages import StageRun
from train.trainer import StageTrainer
from train.weights import origin_history, quiet_transformers, read_origins

if TYPE_CHECKING:
    from peft import PeftModel

LOGS = "logs"
TASKS = "tasks"
"""Folder of the scores that were made while training, by step and task."""
PASSING = shutil.ignore_patterns("model", ".*", "*.log", "*.part.jsonl")
"""What an evaluation leaves that was cut off or has failed."""
TASK_CURVE = "tasks.jsonl"
"""The same in rows: see `train.tasks`."""
ADAPTERS = "adapters"


def save_run(
    run: StageRun,
    mark: Complete,
    trainer: StageTrainer,
    processor: EagleMixProcessor,
    adapters: PeftModel | None,
    origins: Mapping[str, Origin],
    empty: Callable[[], tuple[EagleMixForConditionalGeneration, PeftModel | None]],
) -> None:
    """Write the checkpoint of a run that was trained to its end. All processes.

    A moving average takes the place of what it is of. Adapters are merged into the weights; they
    are also kept alone, in peft's format, under `adapters/<part>`. `empty`: model and adapters of
    the run without weights, into which process 0 puts together what an engine holds in pieces.
    Raises `SaveFailed` if the disk is full.
    """
    model: EagleMixForConditionalGeneration = trainer.accelerator.unwrap_model(trainer.model)
    learned = learning_parts(model)
    trainer.moved.check_frozen(model)
    whole = trainer.engine.keeps_whole
    gathered = {} if whole else trainer.engine.gather(model)
    averaged = trainer.ema.whole() if trainer.ema else {}
    if not trainer.args.should_save:
        return
    if not whole:
        model, adapters = empty()
        kept = {} if trainer.engine.keeps_dtype else _as_loaded(run, model, origins)
        _fill(model, {**gathered, **kept})
    Engine().assign(model, averaged)
    with write_checkpoint(run.folder, mark) as draft:
        state = _write_all(run, model, adapters, processor, learned, origins, draft)
        write_provenance(draft, _provenance(run, model, state, learned, origins))
        trainer.state.save_to_json(str(draft / "trainer_state.json"))
        _copy_logs(run.workspace, draft)


def gather_snapshot(trainer: StageTrainer) -> dict[str, Tensor]:
    """The tensors that the run would end in if it ended now, on the CPU in process 0, with a moving
    average in place of what it is of; nothing elsewhere. All processes.

    They may be those of the model that is trained, and are only to be read.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    whole = trainer.engine.gather(model)
    averaged = trainer.ema.whole() if trainer.ema else {}
    return {name: averaged.get(name, value).to(value.dtype) for name, value in whole.items()}


def write_snapshot(
    run: StageRun,
    trainer: StageTrainer,
    processor: EagleMixProcessor,
    origins: Mapping[str, Origin],
    empty: Callable[[], tuple[EagleMixForConditionalGeneration, PeftModel | None]],
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Write a model with `tensors` of `gather_snapshot` into `folder`. Process 0.

    It is a model for itself: the one that is trained, and its random numbers, are left alone. What
    `empty` is, see `save_run`. Raises `SaveFailed` if the disk is full.
    """
    with torch.random.fork_rng(devices=[]):
        model, adapters = empty()
    kept = {} if trainer.engine.keeps_dtype else _as_loaded(run, model, origins)
    state = {**tensors, **kept}
    if adapters is not None:  # which are merged in place
        state = {name: value.clone() for name, value in state.items()}
    learned = learning_parts(model)
    _fill(model, state)
    with write_checkpoint(folder, trainer.mark) as draft:
        _write_all(run, model, adapters, processor, learned, origins, draft)


def _write_all(
    run: StageRun,
    model: EagleMixForConditionalGeneration,
    adapters: PeftModel | None,
    processor: EagleMixProcessor,
    learned: set[str],
    origins: Mapping[str, Origin],
    draft: Path,
) -> dict[str, Tensor]:
    """All that it takes to use the model, adapters merged, and its recipe; the weights written."""
    if adapters is not None:
        merge_lora(adapters, draft / ADAPTERS)
    state = _final_state(run, model, learned, origins)
    _write_model(run, model, state, draft)
    processor.save_pretrained(draft)
    text = yaml.safe_dump(run.recipe.dump(), sort_keys=False, allow_unicode=True)
    (draft / RECIPE).write_text(text, encoding="utf-8")
    return state


def _as_loaded(
    run: StageRun, model: EagleMixForConditionalGeneration, origins: Mapping[str, Origin]
) -> dict[str, Tensor]:
    """What the run has not changed, as it came: an engine has rounded it to save memory.

    Adapters were trained beside rounded weights and are merged into these, as they are where
    autocast rounds weights for each product. What started random comes from nowhere else.
    """
    unchanged = set(model_tensors(model)) - set(changing_names(model))
    parts = {part_of(name) for name in unchanged}
    loaded = read_origins({part: origins[part] for part in parts}, model.config)
    plain = {name: name.replace(".base_layer.", ".") for name in unchanged}  # as before adapters
    return _in_dtype(run, {name: loaded[was] for name, was in plain.items() if was in loaded})


def _fill(model: EagleMixForConditionalGeneration, state: Mapping[str, Tensor]) -> None:
    """Give a model without weights all of them."""
    assert set(model_tensors(model)) == set(state)
    model.load_state_dict(state, strict=False, assign=True)  # not strict: tied names are missing
    model.tie_weights()


def _final_state(
    run: StageRun,
    model: EagleMixForConditionalGeneration,
    learned: set[str],
    origins: Mapping[str, Origin],
) -> dict[str, Tensor]:
    """The weights to save. Frozen parts that were rounded to save memory are as they came."""
    state = model_tensors(model)
    if run.frozen_dtype != run.dtype:
        frozen = {part: origin for part, origin in origins.items() if part not in learned}
        state |= read_origins(frozen, model.config)
    return _in_dtype(run, state)


def _in_dtype(run: StageRun, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    dtype = getattr(torch, run.dtype)
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def _write_model(
    run: StageRun,
    model: EagleMixForConditionalGeneration,
    state: dict[str, Tensor],
    draft: Path,
) -> None:
    with quiet_transformers():
        model.save_pretrained(draft, state_dict=dict(state))  # which it empties
    path = draft / "config.json"  # transformers looks at the first parameter in memory
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "dtype": run.dtype}, indent=2) + "\n", encoding="utf-8")


def _provenance(
    run: StageRun,
    model: EagleMixForConditionalGeneration,
    state: Mapping[str, Tensor],
    learned: set[str],
    origins: Mapping[str, Origin],
) -> dict[str, PartRecord]:
    hashes = part_hashes(tensor_hashes(state))
    sizes = dict.fromkeys(run.parts, 0)
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] += parameter.numel()
    change = {part: f"{run.title} (LoRA)" if part in run.lora else run.title for part in learned}
    return {
        part: PartRecord(
            sha256=hashes[part],
            parameters=sizes[part],
            history=[
                *origin_history(part, origins[part], run.recipe.seed),
                *([change[part]] if part in change else []),
            ],
        )
        for part in run.parts
    }


def _copy_logs(workspace: Path, draft: Path) -> None:
    for name in (CURVE, TASK_CURVE, HEALTH):
        if (workspace / name).is_file():
            shutil.copy2(workspace / name, draft / name)
    for name in (LOGS, TASKS):
        if (workspace / name).is_dir():
            shutil.copytree(workspace / name, draft / name, ignore=PASSING)
