"""What a run tells transformers' Trainer."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import TrainingArguments

from train.stages import StageRun

DEFAULTS: dict[str, Any] = {
    "dataloader_pin_memory": torch.cuda.is_available(),
    "logging_steps": 10,
    "report_to": "tensorboard",
    "save_total_limit": 1,
}
"""Where ours differ from transformers'; a stage's `args` override them."""


def training_arguments(run: StageRun) -> TrainingArguments:
    """`TrainingArguments` of a run; `ValueError` naming the stage for a value that it refuses."""
    stage, seed = run.stage, run.recipe.seed
    given = {**DEFAULTS, **stage.args, **_batch(run)}
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
    if stage.cache_features and args.world_size > 1:
        raise ValueError(f"stages.{run.name}: cache_features works in one process only.")
    return args


def _batch(run: StageRun) -> dict[str, int]:
    """Micro-batch and accumulation that make up the stage's `batch_size` over all processes."""
    wanted = run.stage.batch_size
    if wanted is None:
        return {}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
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
