"""What a run tells transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from train.engines import Engine, world_size
from train.stages import StageRun

DEFAULTS: dict[str, Any] = {
    "dataloader_pin_memory": torch.cuda.is_available(),
    "logging_steps": 10,
    "report_to": "tensorboard",
    "save_total_limit": 1,
    # said, or accelerate takes no notice of torchrun, and transformers refuses bf16
    "use_cpu": not torch.accelerator.is_available(),
}
"""Where ours differ from transformers'; a stage's `args` override them."""


def training_arguments(run: StageRun, engine: Engine | None = None) -> TrainingArguments:
    """`TrainingArguments` of a run, on `engine` (default: in this process, to look at them).

    Raises `ValueError` naming the stage for a value that transformers refuse or that contradicts
    the engine.
    """
    stage, seed = run.stage, run.recipe.seed
    engine = engine or Engine()
    given = {**DEFAULTS, **engine.arguments(), **stage.args, **_batch(run)}
    if stage.eval:
        given |= {
            "eval_strategy": "steps",
            "eval_steps": stage.eval.every,
            "per_device_eval_batch_size": stage.eval.batch_size,
        }
    try:
        args = TrainingArguments(
            output_dir=str(run.workspace),
            seed=seed,
            data_seed=seed,  # the same order of samples whatever was drawn for the weights
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
            disable_tqdm=True,  # `train.progress` shows a bar
            **given,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"stages.{run.name}: args: {error}") from error
    _check_engine(run, engine, args)
    if stage.cache_features and args.world_size > 1:
        raise ValueError(f"stages.{run.name}: cache_features works in one process only.")
    return args


def _check_engine(run: StageRun, engine: Engine, args: TrainingArguments) -> None:
    try:
        engine.check(args, run.dtype)
    except ValueError as error:
        raise ValueError(f"stages.{run.name}: {error}") from None
    if not engine.keeps_whole and any(lora.quantize for lora in run.lora.values()):
        raise ValueError(
            f"stages.{run.name}: lora: quantize: weights in 4 bit stay whole, and engine: "
            f"{engine.name} splits or rounds them. Choose engine: ddp."
        )
    if run.stage.ema and not engine.can_average:
        raise ValueError(
            f"stages.{run.name}: ema: the average of pieces cannot be put together under engine: "
            f"{engine.name}. Choose engine: zero2 or fsdp2."
        )
    if engine.splits_optimizer and run.stage.muon:
        raise ValueError(
            f"stages.{run.name}: muon needs whole matrices, and engine: {engine.name} splits them. "
            "Choose engine: ddp, or leave muon out."
        )


def _batch(run: StageRun) -> dict[str, int]:
    """Micro-batch and accumulation that make up the stage's `batch_size` over all processes."""
    wanted = run.stage.batch_size
    if wanted is None:
        return {}
    processes = world_size()
    micro = int(run.stage.args.get("per_device_train_batch_size", max(wanted // processes, 1)))
    accumulation, rest = divmod(wanted, micro * processes)
    if rest or not accumulation:
        raise ValueError(
            f"stages.{run.name}: batch_size = {wanted} is not a multiple of {micro} samples "
            f"(args.per_device_train_batch_size) x {processes} processes."
        )
    return {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
    }
