"""TensorBoard's log of a run that may be interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback


class TensorBoardLog(TensorBoardCallback):
    """Logs into `folder`; what a killed process logged after its last resume point is superseded.

    Each start writes a file of its own, which says from which step on it replaces the earlier ones.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero and any(Path(self.logging_dir).glob("events.out.*")):
            self.tb_writer = self._SummaryWriter(
                log_dir=self.logging_dir, purge_step=state.global_step + 1
            )
        else:
            super().on_train_begin(args, state, control, **more)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        # The summary after the last step, which a process killed after it would bring twice, is in
        # `trainer_state.json` alone.
        if "train_loss" not in logs:
            super().on_log(args, state, control, logs, **more)
