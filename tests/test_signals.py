"""A run that is asked to stop: all its processes save the same step, and it goes on from there."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Trainer

from tests.interrupted import (
    Attempt,
    Recipe,
    ask_at,
    at_steps,
    make_hard_world,
    put,
    result,
    send_self,
)
from train.continuing import Continuing
from train.curve import CurveWriter
from train.recipe import parse_recipe
from train.run import run_recipe
from train.signals import ECHO, STOP_CODE, Interrupted, SaveAndStop, StopSignals
from train.sources import find_origins, run_identity
from train.stages import StageRun
from train.trainer import StageTrainer
from train.workspace import last_point


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_hard_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(world: Recipe) -> Path:
    return run_recipe(world)


def last_step(recipe: Recipe) -> int:
    point = last_point(Path(recipe["output_dir"], "unfinished/sft"))
    assert point is not None
    return int(point.name.removeprefix("checkpoint-"))


def test_the_step_is_finished_and_saved_though_workers_hear_the_signal_too(
    world: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    recipe = world | {"output_dir": str(tmp_path / "run")}
    attempt = Attempt(recipe, lambda: at_steps(lambda _: time.sleep(0.05)))
    attempt.wait_for(4)
    attempt.send(signal.SIGTERM)
    assert attempt.exit_code() == STOP_CODE, attempt.log.read_text()
    step = last_step(recipe)
    assert f"sft: saved after step {step}; stopped by SIGTERM. The same command goes on" in (
        attempt.log.read_text()
    )
    run_recipe(recipe)
    assert result(tmp_path / "run/sft") == result(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_other_signals_that_ask_to_stop(
    world: Recipe, tmp_path: Path, number: signal.Signals
) -> None:
    recipe = world | {"output_dir": str(tmp_path / "run")}
    attempt = Attempt(recipe, ask_at(1, number))
    assert attempt.exit_code() == STOP_CODE
    assert last_step(recipe) == 2  # and not 3, which the recipe asks for


def forget_evaluation() -> None:
    ask_at(9)()
    on_step_end = SaveAndStop.on_step_end

    def unowed(self: SaveAndStop, *told: Any, **more: Any) -> None:
        on_step_end(self, *told, **more)
        self.trainer.evaluation_owed = False

    SaveAndStop.on_step_end = unowed  # type: ignore[method-assign]


def ask_within_evaluation() -> None:
    prediction_step = StageTrainer.prediction_step

    def asking(self: StageTrainer, *told: Any, **more: Any) -> Any:
        if self.state.global_step == 10:
            send_self()
        return prediction_step(self, *told, **more)

    StageTrainer.prediction_step = asking  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("prepare", "right"),
    [(ask_at(9), True), (ask_within_evaluation, True), (forget_evaluation, False)],
    ids=["due", "under way", "mistake"],
)
def test_an_evaluation_is_put_off_and_made_up_for(
    world: Recipe, undisturbed: Path, tmp_path: Path, prepare: Callable[[], None], right: bool
) -> None:
    recipe = world | {"output_dir": str(tmp_path / "run")}
    attempt = Attempt(recipe, prepare)
    assert attempt.exit_code() == STOP_CODE, attempt.log.read_text()
    assert last_step(recipe) == 10  # where an evaluation is due
    curve = tmp_path / "run/unfinished/sft/curve.jsonl"
    assert '"step": 10' not in curve.read_text()
    run_recipe(recipe)
    assert (result(tmp_path / "run/sft") == result(undisturbed)) is right


def test_asked_at_the_last_step_it_finishes(
    world: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    recipe = world | {"output_dir": str(tmp_path / "run")}
    attempt = Attempt(recipe, lambda: put(CurveWriter, "on_save", ask_after_saving)())
    assert attempt.exit_code() == 0, attempt.log.read_text()
    assert result(tmp_path / "run/sft") == result(undisturbed)


def ask_after_saving(self: CurveWriter, args: Any, state: Any, control: Any, **_: Any) -> None:
    if state.global_step == state.max_steps:
        send_self()


def hold(echo: float = 0.0) -> int:
    """Exit code of a process that is asked to stop twice, `echo` seconds apart, while held."""

    def work() -> None:
        with StopSignals().listening() as signals, signals.held("x"):
            send_self()
            time.sleep(echo)
            send_self()
            sys.exit(0 if signals.asked == signal.SIGTERM else 1)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def test_a_second_request_ends_at_once_but_not_the_echo_of_the_first() -> None:
    assert hold() == 0
    assert hold(ECHO + 0.1) == -signal.SIGTERM


def test_a_warning_does_not_count_as_the_first_request() -> None:
    with StopSignals().listening() as signals, signals.held("x"):
        send_self(signal.SIGUSR1)
        signals._since -= 2 * ECHO
        send_self()
        assert signals.asked == signal.SIGTERM
        signals._since -= 2 * ECHO
        send_self(signal.SIGUSR1)  # a warning never ends the process


def test_where_there_is_nothing_to_save_the_first_request_ends_the_run() -> None:
    with StopSignals().listening(), pytest.raises(Interrupted) as stopped:
        send_self()
    assert stopped.value.code == STOP_CODE == 75
    assert "goes on from there" in stopped.value.message


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        terminate = signal.getsignal(signal.SIGTERM)
        with StopSignals().listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not terminate
        assert signal.getsignal(signal.SIGTERM) is terminate
    finally:
        signal.signal(signal.SIGHUP, before)


def test_saving_by_the_clock(
    world: Recipe, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a minute a step by a clock of our own, and a point after every minute."""
    recipe = parse_recipe(
        world | {"output_dir": str(tmp_path / "run")},
        "recipe",
        ["stages.sft.save_minutes=1", "stages.sft.args.save_steps=100",
         "stages.sft.args.save_total_limit=9"],
    )  # fmt: skip
    now, saved = [0.0], []

    class Clock:
        monotonic = staticmethod(lambda: now[0])

    on_save, on_step_end = SaveAndStop.on_save, SaveAndStop.on_step_end

    def note(self: SaveAndStop, args: Any, state: Any, control: Any, **more: Any) -> None:
        saved.append(state.global_step)
        on_save(self, args, state, control, **more)

    def tick(self: SaveAndStop, *told: Any, **more: Any) -> None:
        now[0] += 30
        on_step_end(self, *told, **more)

    monkeypatch.setattr("train.signals.time", Clock)
    monkeypatch.setattr(SaveAndStop, "on_save", note)
    monkeypatch.setattr(SaveAndStop, "on_step_end", tick)
    run_recipe(recipe)
    assert saved == [2, 4, 6, 8, 10, 12, 14]
    assert result(tmp_path / "run/sft") == result(undisturbed)


def test_when_it_is_saved_and_how_long_it_waits_are_no_settings(world: Recipe) -> None:
    def identity(*overrides: str) -> dict[str, Any]:
        run = StageRun(parse_recipe(world, "recipe", overrides), "sft")
        return run_identity(run, find_origins(run))

    without = ["save_minutes=5", "args.save_steps=7", "args.ddp_timeout=60"]
    assert identity() == identity(*[f"stages.sft.{each}" for each in without])
    assert identity() != identity("stages.sft.args.learning_rate=7")


# -- several processes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def two(recipe: Recipe, prepare: Callable[[int], Callable[[], None]]) -> list[Attempt]:
    """The run in two processes; `prepare(rank)` is what each of them does first."""
    port = str(free_port())
    return [
        Attempt(
            recipe,
            prepare(rank),
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
             "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def world_of_two(world: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """One sample of each process a step, so that it has more than one epoch."""
    recipe = parse_recipe(world, "recipe", ["stages.sft.args.max_steps=10"]).dump()
    return recipe | {"output_dir": str(tmp_path_factory.mktemp("two") / "run")}


@pytest.fixture(scope="module")
def undisturbed_two(world_of_two: Recipe) -> Path:
    for attempt in two(world_of_two, lambda _: lambda: None):
        assert attempt.exit_code() == 0, attempt.log.read_text()
    return Path(world_of_two["output_dir"], "sft")


def test_two_processes_stop_at_the_same_step_when_one_is_asked(
    world_of_two: Recipe, undisturbed_two: Path, tmp_path: Path
) -> None:
    """In the second epoch, in whose order the continued run has to go on."""
    recipe = world_of_two | {"output_dir": str(tmp_path / "run")}
    attempts = two(recipe, lambda rank: ask_at(7) if rank == 1 else lambda: None)
    for attempt in attempts:
        assert attempt.exit_code() == STOP_CODE, attempt.log.read_text()
    assert last_step(recipe) == 8
    assert len(list((tmp_path / "run/unfinished/sft/checkpoint-8").glob("totals_*"))) == 2
    shutil.copytree(tmp_path / "run", tmp_path / "mistaken")
    for attempt in two(recipe, lambda _: lambda: None):
        assert attempt.exit_code() == 0, attempt.log.read_text()
    assert result(tmp_path / "run/sft") == result(undisturbed_two)

    recipe = recipe | {"output_dir": str(tmp_path / "mistaken")}
    for attempt in two(recipe, lambda _: put(Continuing, "_run_epoch", in_the_first_order)):
        assert attempt.exit_code() == 0, attempt.log.read_text()
    assert result(tmp_path / "mistaken/sft")["weights"] != result(undisturbed_two)["weights"]


def in_the_first_order(self: Continuing, **told: Any) -> None:
    """As the Trainer does it, which leaves the sampler of several processes in its first epoch."""
    self._restore(Path(told["resume_from_checkpoint"]))
    Trainer._run_epoch(self, **told)


def test_a_launcher_hands_the_signal_on(
    world_of_two: Recipe, undisturbed_two: Path, tmp_path: Path
) -> None:
    recipe = world_of_two | {"output_dir": str(tmp_path / "run")}
    told = tmp_path / "recipe.yaml"
    told.write_text(yaml.safe_dump(recipe))
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", str(free_port()), "-m", "train.run", str(told)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=(tmp_path / "log").open("w"),
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    workspace = tmp_path / "run/unfinished/sft"
    deadline = time.monotonic() + 300  # alone on two cores it takes ten
    while last_point(workspace) is None and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(120) == 1  # torchrun has no other code, whatever that of its processes is
    log = (tmp_path / "log").read_text()
    assert f"sft: saved after step {last_step(recipe)}" in log, log
    for attempt in two(recipe, lambda _: lambda: None):
        assert attempt.exit_code() == 0, attempt.log.read_text()
    assert result(tmp_path / "run/sft") == result(undisturbed_two)
