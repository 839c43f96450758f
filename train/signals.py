"""Signals that ask a run to stop: it finishes its step, saves, and ends so that it can go on.

    with StopSignals().listening() as signals:
        with signals.held("sft"):   # noted here, acted upon by `SaveAndStop`
            trainer.train()

Outside of `held` there is nothing to save, and the first signal ends the run.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from train.jobs.worker import end_with_parent

STOP_CODE = 75
"""Exit status of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h, which
schedulers take as "try again". 143 would not tell it from a run that was killed."""

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
WARNING = signal.SIGUSR1
"""What SLURM is usually told to send before it sends SIGTERM (`--signal=USR1@300`)."""

ECHO = 1.0
"""Seconds in which the same request may arrive twice: from a scheduler that signals every process,
and from a launcher that hands on what it got."""


class Interrupted(SystemExit):
    """The run was asked to stop and can be continued; ends the process with `STOP_CODE`."""

    def __init__(self, message: str) -> None:
        super().__init__(STOP_CODE)
        self.message = message


class StopSignals:
    """Hears SIGTERM, SIGINT and SIGHUP, and SIGUSR1 as a warning that they will come.

    The first one is noted while the run is `held`, and else raises `Interrupted`. Another SIGTERM,
    SIGINT or SIGHUP ends the process at once.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._since = 0.0
        self._title = ""
        self._group: Any = None

    @contextmanager
    def listening(self) -> Iterator[StopSignals]:
        """Hear signals in the block. A thread that is not the main one cannot, and does not."""
        before = {}
        for number in (*STOPPING, WARNING):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                with suppress(ValueError):
                    before[number] = signal.signal(number, self._hear)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self, title: str) -> Iterator[None]:
        """Only note signals in the block, which acts upon them where it can be continued."""
        self._title = title
        try:
            yield
        finally:
            self._title = ""

    def agreed(self) -> bool:
        """Whether any process was asked to stop; every process must call it at the same point."""
        stop, _ = self.agree()
        return stop

    def agree(self, save: bool = False) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether any says `save`; as `agreed`."""
        flags = torch.tensor([self.asked is not None, save], dtype=torch.int32)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            if self._group is None:  # on the CPU: a GPU would have to wait for its own work
                self._group = dist.new_group(backend="gloo")
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        if flags[0] and self.asked is None:
            self.asked = signal.SIGTERM
        return bool(flags[0]), bool(flags[1])

    def stop(self, what: str) -> NoReturn:
        """Raise `Interrupted`, saying how far the run has come."""
        name = self.asked.name if self.asked else "a signal"
        raise Interrupted(f"{what}; stopped by {name}. The same command goes on from there.")

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked in (None, WARNING):
            first = self.asked is None
            self.asked, self._since = signal.Signals(number), now
            if not self._title:
                self.stop("between two runs or before the first step")
            if first and is_first_process():
                text = f"{self._title}: {self.asked.name}: finishing this step, then saving\n"
                os.write(2, text.encode())  # a handler must not enter `print` a second time
        elif number != WARNING and now - self._since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def is_first_process() -> bool:
    """Of those that a launcher has started together; known before they have found each other."""
    return os.environ.get("RANK", "0") == "0"


class EvaluationCut(Exception):
    """Raised out of an evaluation by a request to stop; it is made up for later."""


class SaveAndStop(TrainerCallback):
    """Ends the run with a resume point when it is asked to, all processes at the same step.

    `save_minutes`: also save a resume point whenever so much time has passed since the last one,
    by the clock of process 0.
    """

    def __init__(
        self, trainer: Trainer, title: str, signals: StopSignals, save_minutes: float | None = None
    ) -> None:
        self.trainer = trainer
        self.title = title
        self.signals = signals
        self.every = float("inf") if save_minutes is None else 60 * save_minutes
        self.stopping = False
        self._saved = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = state.is_world_process_zero and time.monotonic() - self._saved >= self.every
        stop, save = self.signals.agree(due)
        # After the last step the run is as good as finished.
        if stop and state.global_step < state.max_steps:
            self.stopping = True
            self.trainer.evaluation_owed = control.should_evaluate
            control.should_evaluate = False
        control.should_save |= save or self.stopping

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.is_in_train and self.signals.agreed():
            self.stopping = True
            raise EvaluationCut

    def waited(self, done: bool) -> bool:
        """Whether what the others wait for in process 0 is `done`; they say that it is not.

        All processes, again and again until then. Raises `EvaluationCut` if the run is asked to
        stop meanwhile: then it ends with this step saved, be it the last one.
        """
        stop, done = self.signals.agree(done)
        if stop and not done:
            self.stopping = True
            raise EvaluationCut
        return done

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = time.monotonic()
        if self.stopping:
            self.signals.stop(f"{self.title}: saved after step {state.global_step}")


def shield_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Keep signals from the workers of `loader`, and let them end when this process does.

    Launchers and schedulers signal every process. A worker that obeyed would leave the step that
    is to be finished without data.
    """
    base = getattr(loader, "base_dataloader", loader)  # what accelerate has wrapped
    base.worker_init_fn = _Shielded(base.worker_init_fn)
    return loader


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class _Shielded:
    """Can be pickled, for workers that are not forked."""

    def __init__(self, prepare: Any) -> None:
        self.prepare = prepare

    def __call__(self, worker: int) -> None:
        for number in {*STOPPING, WARNING} - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)
        # The parent's own is obeyed: it could not exit without.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, name="parent-watch", daemon=True).start()
        end_with_parent()
        if self.prepare is not None:
            self.prepare(worker)
