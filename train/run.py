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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

from eagle_moe.checkpoint import Complete
from train.arguments import training_arguments
from train.curve import CURVE, CurveWriter, SkillMetric
from train.engines import Engine, make_engine
from train.jobs import DirectoryBusy
from train.moved import TrainingFault
from train.prepare import Prepared, check_start, empty_model, prepare
from train.progress import ProgressReport
from train.recipe import Recipe, load_recipe, parse_recipe
from train.save import LOGS, save_run
from train.shrink import shrink
from train.signals import STOP_CODE, Interrupted, SaveAndStop, StopSignals, is_first_process
from train.sources import find_origins, run_identity
from train.stages import StageRun, stage_runs
from train.table import show, show_parts, stages_table
from train.tasks import TaskScores
from train.tensorboard import TensorBoardLog
from train.trainer import StageTrainer
from train.workspace import is_finished, locked, mark_of, open_workspace, remove_workspace


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
    check_start(runs)
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
    check_start(runs)
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
        prepared = prepare(run, origins)
        show_parts(run, prepared.model, origins, args.learning_rate)
        trainer = _trainer(run, mark, engine, args, prepared)
        stop = SaveAndStop(trainer, run.title, signals, run.stage.save_minutes)
        if tasks := run.stage.tasks:  # before those that close the logs
            given = (prepared.processor, origins, lambda: empty_model(run))
            trainer.add_callback(TaskScores(tasks, run, trainer, stop, *given))
        with signals.held(run.title):
            with _watched(trainer, run):
                trainer.add_callback(stop)  # the last one: it knows what the others have asked for
                trainer.train(resume_from_checkpoint=str(point) if point else None)
            processor, adapters = prepared.processor, prepared.adapters
            save_run(run, mark, trainer, processor, adapters, origins, lambda: empty_model(run))
            if args.process_index == 0:
                remove_workspace(run)
            trainer.accelerator.wait_for_everyone()  # the next run starts from what was just saved
        print(f"{run.title}: done, in {run.folder}")
    return run.folder


def _trainer(
    run: StageRun, mark: Complete, engine: Engine, args: TrainingArguments, prepared: Prepared
) -> StageTrainer:
    held_out = prepared.held_out
    return StageTrainer(
        run.rates(args.learning_rate),
        mark,
        muon=run.stage.muon,
        engine=engine,
        ema=run.stage.ema,
        health=run.health,
        peak_tflops=run.recipe.peak_tflops,
        weight_decays=run.of_learning_parts(run.stage.weight_decay),
        layer_decays=run.of_learning_parts(run.stage.layer_decay),
        model=prepared.model,
        args=args,
        train_dataset=prepared.dataset,
        eval_dataset=held_out,
        compute_metrics=SkillMetric(held_out) if held_out else None,
        data_collator=prepared.collator(run, args.device),
        processing_class=prepared.processor,
    )


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


def _dry_run(runs: Iterable[StageRun]) -> None:
    """Show what would learn, from models without weights."""
    for run in runs:
        model, _ = empty_model(run)
        show_parts(run, model, {}, training_arguments(run).learning_rate)


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
    return exit_status(lambda: _main(told))


def exit_status(work: Callable[[], int]) -> int:
    """That of `work`; of a person's mistake 2, told in one line, and of a stop `STOP_CODE`."""
    try:
        return work()
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
    check_start(runs)
    if told.dry_run:
        _dry_run(runs)
        return 0
    _train_all(runs, told.redo)
    return 0


if __name__ == "__main__":
    sys.exit(main())
