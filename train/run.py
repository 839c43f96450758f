"""Run a recipe: every stage in order, or one of them.

    python -m train.run RECIPE.yaml [key.sub=value ...] [--stage NAME [--expert NAME]]
                        [--list | --dry-run] [--redo] [--shrink]

A finished stage is skipped and an interrupted one continues where it was. Stages one by one give
the same weights as all at once: each starts from the checkpoint that an earlier one has written.
Exit status: 0 done, 2 an error that the message explains, 75 stopped by a signal and to be gone on
with by the same command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

from eagle_moe.build import build_config, build_model, build_processor, load_tokenizer
from eagle_moe.config import EagleMixConfig
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import part_modules
from eagle_moe.processor import EagleMixProcessor
from train.arguments import training_arguments
from train.curve import CURVE, CurveWriter, SkillMetric
from train.data import (
    Collator,
    ConversationDataset,
    MixtureDataset,
    PackedDataset,
    check_keeps_apart,
    check_supervision,
)
from train.engines import make_engine
from train.features import FeatureCollator, FeatureDataset, FeatureStore
from train.jobs import DirectoryBusy
from train.learning import open_parts
from train.lora import add_lora
from train.moved import TrainingFault
from train.progress import ProgressReport
from train.quantize import require_bitsandbytes
from train.recipe import Recipe, load_recipe, parse_recipe
from train.recompute import recompute_blocks
from train.save import LOGS, save_run
from train.shrink import shrink
from train.signals import STOP_CODE, Interrupted, SaveAndStop, StopSignals, is_first_process
from train.sources import check_sources, find_origins, run_identity
from train.stages import StageRun, stage_runs
from train.table import parts_table, show, stages_table
from train.tensorboard import TensorBoardLog
from train.trainer import StageTrainer
from train.weights import load_model, origin_history
from train.workspace import is_finished, locked, mark_of, open_workspace, remove_workspace

if TYPE_CHECKING:
    from peft import PeftModel


def run_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    stage: str | None = None,
    redo: bool = False,
) -> Path:
    """Run all stages of a recipe in order, or `stage`; returns the folder of the last one.

    `redo`: replace results that were made with other settings instead of refusing to.
    Raises `ValueError` or `FileNotFoundError` for what a person can mend, before weights are read,
    and `Interrupted`, a `SystemExit`, after a signal that asks to stop.
    """
    recipe = _resolve(recipe, overrides)
    names = [stage] if stage else list(recipe.stages)
    runs = [run for name in names for run in stage_runs(recipe, name)]
    _check_start(recipe, runs)
    _train_all(runs, redo)
    return Path(recipe.output_dir, names[-1])


def run_stage(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    stage: str,
    expert: str | None = None,
    overrides: Sequence[str] = (),
    redo: bool = False,
) -> Path:
    """Run one stage, or one expert's run of a `per_expert` stage; returns its folder.

    Runs of different experts may go on at the same time in different processes.
    """
    recipe = _resolve(recipe, overrides)
    runs = stage_runs(recipe, stage, expert)
    _check_start(recipe, runs)
    _train_all(runs, redo)
    return runs[0].folder if expert else Path(recipe.output_dir, stage)


def _train_all(runs: Sequence[StageRun], redo: bool) -> None:
    for run in runs:
        training_arguments(run, make_engine(run.engine))  # before the first of them begins
    with StopSignals().listening() as signals:
        for run in runs:
            if signals.agreed():
                signals.stop(f"{run.title}: not begun")
            train(run, signals, redo)


def train(run: StageRun, signals: StopSignals, redo: bool = False) -> Path:
    """One training run, from the checkpoints that it starts from to the one that it ends in."""
    engine = make_engine(run.engine)
    args = training_arguments(run, engine)
    origins = find_origins(run)
    mark = mark_of(run, run_identity(run, origins))
    if is_finished(run, mark, redo):
        if args.process_index == 0:
            remove_workspace(run)
            print(f"{run.title}: finished before, in {run.folder}")
        return run.folder
    with _in_charge(run, args):
        with args.main_process_first(local=False):
            point = open_workspace(run, mark, redo)
        if point:
            print(f"{run.title}: continues from {point}")
        processor, config = _build(run)
        dataset, held_out = _data(run, processor)
        model = load_model(run, config, origins)
        if run.stage.packing:
            check_keeps_apart(model.model.language_model)
        adapters = _open(run, model)
        rates = run.rates(args.learning_rate)
        histories = {part: origin_history(part, origins[part], run.recipe.seed) for part in origins}
        show(parts_table(run, model, rates, histories))
        if needless := run.needless_checkpointing:
            print(
                f"{run.title}: checkpointing of {', '.join(needless)} is left out: frozen, and "
                "nothing before it learns, so there are no activations to save"
            )
        trainer = StageTrainer(
            rates,
            mark,
            muon=run.stage.muon,
            engine=engine,
            ema=run.stage.ema,
            health=run.health,
            peak_tflops=run.recipe.peak_tflops,
            weight_decays=run.of_learning_parts(run.stage.weight_decay),
            layer_decays=run.of_learning_parts(run.stage.layer_decay),
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=held_out,
            compute_metrics=SkillMetric(held_out) if held_out else None,
            data_collator=_collator(run, processor, model, dataset, held_out),
            processing_class=processor,
        )
        with signals.held(run.title):
            with _watched(trainer, run):
                # the last one, which knows what the others have asked for
                stop = SaveAndStop(trainer, run.title, signals, run.stage.save_minutes)
                trainer.add_callback(stop)
                trainer.train(resume_from_checkpoint=str(point) if point else None)
            save_run(run, mark, trainer, processor, adapters, origins, lambda: _empty(run))
            if args.process_index == 0:
                remove_workspace(run)
            trainer.accelerator.wait_for_everyone()  # the next run starts from what was just saved
        print(f"{run.title}: done, in {run.folder}")
    return run.folder


@contextmanager
def _in_charge(run: StageRun, args: TrainingArguments) -> Iterator[None]:
    """Keep other runs out of the workspace; of several processes, let the first one speak."""
    if args.process_index == 0:
        with locked(run):
            yield
    else:
        with redirect_stdout(StringIO()):
            yield


def _resolve(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str]) -> Recipe:
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides)
    data = recipe.dump() if isinstance(recipe, Recipe) else recipe
    return parse_recipe(data, "recipe", overrides)


def _check_start(recipe: Recipe, runs: Sequence[StageRun]) -> None:
    """Everything that can be known to fail fails here, before anything is loaded or spent."""
    check_sources(runs)
    for run in runs:
        training_arguments(run)
        if any(lora.quantize for lora in run.lora.values()):
            require_bitsandbytes()
        for name in _data_names(run):
            spec = recipe.data[name]
            try:
                spec.check_files()
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(f"{recipe.name}: data.{name}: {error}") from None


def _data_names(run: StageRun) -> list[str]:
    return [*run.stage.data, *([run.stage.eval.data] if run.stage.eval else [])]


def _build(run: StageRun) -> tuple[EagleMixProcessor, EagleMixConfig]:
    tokenizer = load_tokenizer(run.model_spec)
    processor = build_processor(run.model_spec, tokenizer)
    return processor, build_config(run.model_spec, processor.image_token_id)


def _data(
    run: StageRun, processor: EagleMixProcessor
) -> tuple[MixtureDataset | PackedDataset, ConversationDataset | None]:
    """What the run learns from, and what it is evaluated on while it does."""
    stage, data = run.stage, run.recipe.data
    kind = FeatureDataset if stage.cache_features else ConversationDataset
    parts = [kind(data[name], processor, stage.max_length) for name in stage.data]
    mixture = MixtureDataset(parts, run.recipe.seed)
    whole = stage.packing or stage.length_aware
    seen = check_supervision(mixture, stage.max_unsupervised, whole=whole)
    print(f"{run.title}: {seen.told}")
    if stage.length_aware:
        mixture.sort_by_work()
    held_out = kind(data[stage.eval.data], processor, stage.max_length) if stage.eval else None
    if not stage.packing:
        return mixture, held_out
    packed = PackedDataset(mixture, stage.max_length)
    print(f"{run.title}: {packed.told}")
    return packed, held_out


def _collator(
    run: StageRun,
    processor: EagleMixProcessor,
    model: EagleMixForConditionalGeneration,
    dataset: MixtureDataset | PackedDataset,
    held_out: ConversationDataset | None,
) -> Collator:
    """Samples -> batch; if the experts' maps are kept on disk, they are all there afterwards."""
    if not run.stage.cache_features:
        return Collator(processor)
    towers = model.model.vision_tower.towers.to(training_arguments(run).device)
    store = FeatureStore(run.features, towers, processor.image_processor)
    datasets = [*dataset.parts, *([held_out] if held_out else [])]
    store.fill([each for each in datasets if isinstance(each, FeatureDataset)], run.title)
    return FeatureCollator(processor, store)


def _open(run: StageRun, model: nn.Module) -> PeftModel | None:
    """Let learn what the stage says, and nothing else; the adapters, if there are any."""
    model.requires_grad_(False)
    mixed = bool(run.stage.args.get("bf16"))
    adapters = add_lora(model, run.lora, torch.bfloat16 if mixed else getattr(torch, run.dtype))
    open_parts(model, run.trainable)
    for part in set(run.parts) - set(run.trainable) - set(run.lora):
        for module in part_modules(model, part):
            module.to(getattr(torch, run.frozen_dtype))
    recompute_blocks(model, run.checkpointing)
    return adapters


@contextmanager
def _watched(trainer: StageTrainer, run: StageRun) -> Iterator[None]:
    """Progress, learning curve, and TensorBoard in a folder without the machine's name in it."""
    report = ProgressReport(run.title)
    trainer.add_callback(report)
    if isinstance(trainer.compute_metrics, SkillMetric):
        trainer.add_callback(CurveWriter(run.workspace / CURVE, trainer.compute_metrics))
    if trainer.pop_callback(TensorBoardCallback):
        trainer.add_callback(TensorBoardLog(run.workspace / LOGS))
    try:
        yield
    finally:
        report.close()


def _empty(run: StageRun) -> tuple[EagleMixForConditionalGeneration, PeftModel | None]:
    """The run's model and adapters without weights."""
    with torch.device("meta"):
        model = build_model(_build(run)[1])
        return model, _open(run, model)


def _dry_run(runs: Iterable[StageRun]) -> None:
    """Show what would learn, from models without weights."""
    for run in runs:
        model, _ = _empty(run)
        show(parts_table(run, model, run.rates(training_arguments(run).learning_rate), {}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m train.run`."""
    parser = argparse.ArgumentParser(prog="python -m train.run", description="Train by a recipe.")
    parser.add_argument("recipe", help="path of the recipe (YAML)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="stages.sft.args.max_steps=10"
    )
    parser.add_argument("--stage", help="only this stage")
    parser.add_argument("--expert", help="only this expert's run of a per_expert stage")
    parser.add_argument("--redo", action="store_true", help="replace results of other settings")
    parser.add_argument("--list", action="store_true", help="show the stages and their state")
    parser.add_argument("--dry-run", action="store_true", help="check, show what would learn, stop")
    parser.add_argument(
        "--shrink", action="store_true", help="the same with toy sizes and data, on a CPU"
    )
    told = parser.parse_intermixed_args(arguments)
    try:
        return _main(told)
    except Interrupted as stopped:
        if is_first_process():
            print(stopped.message, file=sys.stderr)
        return STOP_CODE
    except (ValueError, OSError, DirectoryBusy, TrainingFault) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(told: argparse.Namespace) -> int:
    recipe = load_recipe(told.recipe, told.overrides)
    if told.shrink:
        recipe = shrink(recipe)
    names = [told.stage] if told.stage else list(recipe.stages)
    if told.expert and not told.stage:
        raise ValueError("--expert: say of which --stage.")
    runs = [run for name in names for run in stage_runs(recipe, name, told.expert)]
    if told.list:
        show(stages_table(runs))
        return 0
    _check_start(recipe, runs)
    if told.dry_run:
        _dry_run(runs)
        return 0
    _train_all(runs, told.redo)
    return 0


if __name__ == "__main__":
    sys.exit(main())
