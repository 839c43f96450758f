"""What the jobs of a search do: align an expert, train a mixture, score it. One process each."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from eagle_moe.checkpoint import read_complete, replace_text
from train.jobs import progress
from train.recipe import parse_recipe
from train.search.store import STAGE, StageFacts, alone_with, keep_expert
from train.stages import StageRun

Plain = dict[str, Any]

COST = "cost.json"
"""Beside the answers: the `Cost` of the mixture."""


def align_expert(
    out: Path, recipe: Plain, stage: str, expert: str, place: str, gpus: int = 0
) -> None:
    """Put `expert`, aligned by `stage` of the recipe, into the store at `place`, if it lacks it.

    `recipe` has this stage and this expert alone. The run's own checkpoint, which holds a language
    model as well, is removed.
    """
    own = out / "run"
    if (out / STAGE).is_file():  # killed while it removed what is not needed
        shutil.rmtree(own, ignore_errors=True)
        return
    run = _run(recipe | {"output_dir": str(own)}, stage, expert)
    with alone_with(Path(place)):
        stored = StageFacts.read(Path(place)) if read_complete(Path(place)) else None
        if stored is None or run.folder.exists():
            seconds = train_stage(run, out, gpus)
            stored = StageFacts(_steps(run.folder), seconds)
            if read_complete(Path(place)) is None:
                keep_expert(run, Path(place), stored)
        else:
            print(f"{run.title}: found in the store, {place}")
            stored = StageFacts(stored.steps, stored.seconds, trained=False)
    stored.write(out)
    shutil.rmtree(own, ignore_errors=True)


def train_mixture(out: Path, recipe: Plain, stage: str, gpus: int = 0) -> None:
    """Run `stage`, the only one of `recipe`; the checkpoint is `out/<stage>`."""
    run = _run(recipe | {"output_dir": str(out)}, stage)
    seconds = train_stage(run, out, gpus)
    StageFacts(_steps(run.folder), seconds).write(out)


def score_mixture(
    out: Path,
    model: str,
    data: str,
    content: str,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int,
) -> None:
    """Ask the model of a trial, and note what its mixture costs.

    `content`: the hash of what is asked, so that the job is another one if that changes.
    """
    from eagle_moe.config import EagleMixConfig
    from eval.run import evaluate
    from train.search.cost import mixture_cost

    evaluate(
        model,
        data,
        out,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cost = mixture_cost(EagleMixConfig.from_pretrained(model), device)
    replace_text(out / COST, json.dumps(asdict(cost)))


def train_stage(run: StageRun, out: Path, gpus: int) -> float:
    """Train, here or, on several GPUs, in as many processes; seconds that it took.

    Raises as `train.jobs.ranks.run_ranks` if one of them failed or was ended.
    """
    started = time.monotonic()
    if gpus > 1:
        _join(run, out, gpus)
    else:
        from train.run import run_stage

        run_stage(run.recipe, run.name, run.expert, redo=True)
    return round(time.monotonic() - started, 3)


def _run(recipe: Plain, stage: str, expert: str | None = None) -> StageRun:
    return StageRun(parse_recipe(recipe, "the trial's recipe"), stage, expert)


def _steps(checkpoint: Path) -> int:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    steps: int = state["global_step"]
    return steps


def _join(run: StageRun, out: Path, processes: int) -> None:
    """Run the stage on the GPUs that this job was given, a process on each."""
    from train.jobs.ranks import run_ranks

    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(run.recipe.dump(), sort_keys=False), encoding="utf-8")
    command = ["-m", "train.run", str(path), "--stage", run.name, "--redo"]
    run_ranks(command + (["--expert", run.expert] if run.expert else []), processes)
