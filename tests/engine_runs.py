"""Runs of a tiny recipe on two processes, with text-only batches, watched from inside."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.interrupted import ask_at
from tests.ranks import on_ranks
from tests.tiny_run import make_recipe, make_world

LIMIT = 150  # of which a run alone on two cores takes three
"""Seconds after which a process of a run is killed by its own alarm."""

LAZY = ("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.ops.op_builder.all_ops")
"""What DeepSpeed imports when an engine is made: seconds for each process, unless it is here."""


def make_mixed_world(folder: Path) -> None:
    """The tiny world; of its questions, four of twelve have no picture."""
    make_world(folder)
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for row in rows[::3]:
        del row["image"]
        row["conversations"][0]["value"] = "Which colour is grass?"
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def mixed_recipe(folder: Path, out: Path, engine: str, **stage: Any) -> dict[str, Any]:
    """Four steps of two samples per process; ConvNeXt is frozen, all else learns."""
    recipe = make_recipe(folder)
    sft = recipe["stages"]["sft"] | {
        "init_from": [],
        "data": ["mixed"],
        "trainable": ["experts.clip", "connector", "language_model"],
        "lr": {"experts.clip": 1e-4},
        "batch_size": 4,
    }
    del sft["eval"]
    args = {"max_steps": 4, "save_steps": 2, "save_total_limit": 5, "use_cpu": True}
    sft["args"] = sft["args"] | args | {"per_device_train_batch_size": 1} | stage.pop("args", {})
    recipe["data"]["mixed"] = {"path": str(folder / "mixed.jsonl")}
    recipe["stages"] = {"sft": sft | stage}
    return recipe | {"output_dir": str(out), "engine": engine}


def run_on_two(
    recipe: dict[str, Any],
    folder: Path,
    before: Callable[[int], None] = lambda rank: None,
    limit: int = LIMIT,
    count: int = 2,
) -> list[tuple[int, str]]:
    """Exit code (negative: killed by that signal) and error message of each process.

    `before(rank)` is called in each of them, to change what a test wants changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if str(recipe["engine"]).startswith("zero"):
        for name in LAZY:
            importlib.import_module(name)
    return on_ranks(
        partial(_in_child, recipe, folder, before, limit), folder, count, limit=limit + 15
    )


def _in_child(
    recipe: dict[str, Any], folder: Path, before: Callable[[int], None], limit: int, rank: int
) -> tuple[int, str]:
    """In a process of its own below the rank's, so that it may die."""
    said = folder / f"error-{rank}.txt"
    child = os.fork()
    if child == 0:
        gc.freeze()  # DeepSpeed collects garbage, and would copy all that was imported
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphans
        signal.alarm(limit)
        os._exit(_run(recipe, folder, before, rank, said))
    _, status = os.waitpid(child, 0)
    message = said.read_text() if said.exists() else ""
    return os.waitstatus_to_exitcode(status), message


def _run(
    recipe: dict[str, Any], folder: Path, before: Callable[[int], None], rank: int, said: Path
) -> int:
    from train.run import run_recipe
    from train.signals import Interrupted

    said.unlink(missing_ok=True)
    _watch(folder / f"seen-{rank}.jsonl")
    before(rank)
    try:
        run_recipe(recipe)
    except Interrupted as stopped:
        return int(str(stopped.code))
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        said.write_text(f"{type(error).__name__}: {error}")
        return 1
    return 0


def _watch(path: Path) -> None:
    """Note every batch (had it an image, how many experts did compute) and how the model is
    wrapped."""
    from eagle_moe.experts import EXPERTS
    from eagle_moe.model import EagleMixModel
    from train.resume import ResumePoints

    computed = 0
    file = path.open("w")

    def note(**row: Any) -> None:
        file.write(json.dumps(row) + "\n")
        file.flush()

    def counted(forward: Any) -> Any:
        def call(self: Any, view: Any) -> Any:
            nonlocal computed
            computed += 1
            return forward(self, view)

        return call

    for kind in ("clip", "convnext"):
        EXPERTS[kind].forward = counted(EXPERTS[kind].forward)

    forward, prepare = EagleMixModel.forward, ResumePoints._prepare_for_training

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal computed
        computed = 0
        result = forward(self, *args, **kwargs)
        note(image=kwargs.get("pixel_values") is not None, computed=computed)
        return result

    def told(self: Any, *args: Any) -> Any:
        prepared = prepare(self, *args)
        first = next(self.model.model.language_model.parameters())
        note(
            wrapped=type(self.model_wrapped).__name__,
            bases=[base.__name__ for base in type(self.model_wrapped).__mro__],
            tensor=type(first.data).__name__,
            held=first.numel() if type(first.data).__name__ != "DTensor" else -1,
            optimizer=type(self.optimizer.optimizer).__name__,
        )
        return prepared

    EagleMixModel.forward = noted
    ResumePoints._prepare_for_training = told


def seen(folder: Path, rank: int) -> list[dict[str, Any]]:
    """What `_watch` noted."""
    lines = (folder / f"seen-{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def kill_at(step: int) -> Callable[[int], None]:
    """For `before`: SIGKILL every process right after the resume point of `step`."""

    def before(rank: int) -> None:
        from train.resume import ResumePoints

        save = ResumePoints._save_checkpoint

        def save_and_die(self: Any, *args: Any) -> None:
            save(self, *args)
            if self.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        ResumePoints._save_checkpoint = save_and_die

    return before


def stop_at(step: int, *ranks: int) -> Callable[[int], None]:
    """For `before`: SIGTERM to these processes within the step that follows `step`."""
    return lambda rank: ask_at(step)() if rank in ranks else None


def losses(folder: Path) -> list[float]:
    """What was logged for each step."""
    return logged(folder, "loss")


def logged(folder: Path, name: str) -> list[float]:
    """A value of each log line that has it."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [row[name] for row in state["log_history"] if name in row]
