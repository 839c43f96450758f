"""A job in several processes, one for each of its GPUs, started and joined by torch's launcher."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from train.jobs.worker import THREAD_VARIABLES

_HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by the launcher


def run_ranks(arguments: Sequence[str], processes: int) -> None:
    """Run `python ARGUMENTS` in processes that find each other by what torchrun sets (RANK, ...).

    They share the job's threads. A request to stop is handed on to all of them, which have
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (30) to save. Raises `SystemExit` with the status
    EX_TEMPFAIL, so that another attempt is made, if that happened or if something else than itself
    has ended one of them; `RuntimeError` if one has failed.
    """
    threads = max(1, int(os.environ.get(THREAD_VARIABLES[0], "1")) // processes)
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # the runner starts all of them anew
    )
    before = {number: signal.getsignal(number) for number in _HEARD}
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException:
        raise SystemExit(os.EX_TEMPFAIL) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 or failure.exitcode == os.EX_TEMPFAIL:
            print(f"rank {rank} was ended by something else: {failure.message}", file=sys.stderr)
            raise SystemExit(os.EX_TEMPFAIL) from None
        raise RuntimeError(f"rank {rank} ended with code {failure.exitcode}: see above") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
