"""Runs in processes of their own, to be killed and continued, and all that is left of them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny_run import make_world
from train.continuing import Continuing
from train.run import main

STEPS = 14
MEASURED = re.compile(r"(^|[/_])(time_\w+|runtime|mfu\w*|tflops\w*|\w+_per_second\w*)$")
"""Names of logged values that depend on the clock."""

Recipe = dict[str, Any]


def make_hard_world(folder: Path) -> Recipe:
    """Shuffled data over three epochs, loader workers, accumulation, dropout, LoRA, evaluation.

    Saves, log lines and evaluations fall on different steps, and the rate does not fall to zero.
    """
    recipe = make_world(folder)
    sft = recipe["stages"]["sft"] | {
        "init_from": [],
        "trainable": ["experts.clip", "connector"],
        "lora": {"language_model": {"r": 2, "dropout": 0.2}},
        "eval": {"data": "test", "every": 5, "batch_size": 4},
        "args": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "dataloader_num_workers": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant_with_warmup",
            "logging_steps": 2,
            "save_steps": 3,
            "save_total_limit": 2,
            "report_to": "tensorboard",
        },
    }
    return recipe | {"stages": {"sft": sft}}


def result(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, but for times: weights, losses, curve, TensorBoard."""
    state = json.loads((folder / "trainer_state.json").read_text())
    events = EventAccumulator(str(folder / "logs"), size_guidance={"scalars": 0, "tensors": 0})
    scalars = events.Reload()
    return {
        "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "log": [without_times(entry) for entry in state["log_history"]],
        "curve": (folder / "curve.jsonl").read_text(),
        "tensorboard": without_times(
            {
                tag: [(event.step, event.value) for event in scalars.Scalars(tag)]
                for tag in scalars.Tags()["scalars"]
            }
        ),
        "texts": {tag: len(scalars.Tensors(tag)) for tag in scalars.Tags()["tensors"]},
    }


def without_times(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if not MEASURED.search(name)}


class Attempt:
    """A run in a process group of its own, which is killed from outside or kills itself."""

    def __init__(
        self,
        recipe: Recipe,
        prepare: Callable[[], None] = lambda: None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.recipe, self.prepare, self.environment = recipe, prepare, environment
        self.log = Path(f"{recipe['output_dir']}-{environment.get('RANK', '')}.log")
        context = multiprocessing.get_context("fork")
        self.began, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=self._work, args=(sender,))
        self.process.start()
        sender.close()

    def _work(self, began: Connection) -> None:
        os.setpgid(0, 0)
        os.environ.update(self.environment)
        for state in (AcceleratorState, GradientState, PartialState):  # what the parent has set up
            state._shared_state.clear()
        sys.stdout = sys.stderr = self.log.open("a", buffering=1)
        self.prepare()
        at_steps(lambda step: began.send(step))
        told = self.log.with_suffix(".yaml")
        told.write_text(yaml.safe_dump(self.recipe))
        sys.exit(main([str(told)]))

    def kill(self, seconds: float, after_a_step: bool) -> None:
        if after_a_step:
            self.began.poll(60)
        time.sleep(seconds)
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """To the run and its loader workers."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, number)

    def wait_for(self, step: int) -> None:
        """Until so many steps are finished."""
        while self.began.poll(60) and self.began.recv() < step:
            pass

    def exit_code(self) -> int:
        self.process.join(120)
        assert self.process.exitcode is not None
        return self.process.exitcode


def at_steps(call: Callable[[int], object]) -> None:
    """In this process, call with the number of finished steps before every forward pass."""
    training_step = Continuing.training_step

    def marked(self: Continuing, *args: Any, **options: Any) -> Any:
        call(self.state.global_step)
        return training_step(self, *args, **options)

    Continuing.training_step = marked  # type: ignore[method-assign]


def send_self(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def ask_at(step: int, number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """Send this process a signal within the step that follows `step`.

    Once, and not for every micro batch: a second one ends the process.
    """
    asked = False

    def ask(now: int) -> None:
        nonlocal asked
        if now == step and not asked:
            asked = True
            send_self(number)

    return lambda: at_steps(ask)


def put(holder: Any, name: str, instead: Callable[..., Any]) -> Callable[[], None]:
    return lambda: setattr(holder, name, instead)
