"""A job's directory: the record of what was done, the lock against a second runner, clearing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import reduction
from pathlib import Path
from typing import Any, Literal

RECORD = "job.json"
LOG = "log.txt"
LOCK = "job.lock"
_OWN = {RECORD, RECORD + ".new", LOG, LOCK}

LOCK_WAIT = 3.0
"""Seconds in which the processes of a runner that was just killed are sure to be gone."""


_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What flock(2) fails with on storage that is mounted without locks."""


class DirectoryBusy(RuntimeError):
    """Another runner works in the directory."""


@dataclass(frozen=True)
class Record:
    """`job.json`. `seconds` is wall time, of the last run if there were several."""

    fingerprint: str
    status: Literal["running", "finished"]
    seconds: float = 0.0


def read_record(out: Path) -> Record | None:
    """The record in `out`, or None where there is none that can be read."""
    try:
        return Record(**json.loads((out / RECORD).read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def write_record(out: Path, record: Record) -> None:
    """Write beside and rename, so that a reader never sees half a record."""
    beside = out / (RECORD + ".new")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(asdict(record), file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(out / RECORD)


def refuse_foreign(out: Path) -> None:
    """Raise `ValueError` if `out` holds files that no job has left there: they are not cleared."""
    foreign = _contents(out)
    if foreign and read_record(out) is None:
        raise ValueError(
            f"{out}: holds {foreign[0].name} but no {RECORD}, so it is not a job's directory. "
            "Move it away or choose another one."
        )


def prepare(out: Path, fingerprint: str) -> None:
    """Make `out` ready for a run: kept as it is when the same job was interrupted, else cleared."""
    record = read_record(out)
    if record is None or record.fingerprint != fingerprint:
        (out / LOG).unlink(missing_ok=True)
        for path in _contents(out):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_record(out, Record(fingerprint, "running"))


def _contents(out: Path) -> list[Path]:
    """What the job, not the runner, has put into `out`."""
    return [path for path in out.iterdir() if path.name not in _OWN]


class Lock:
    """An exclusive lock on a directory. Sent to a process, it is held by that process as well.

    So a directory stays locked until the last process that works in it is gone, even when the
    runner was killed.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def take(cls, out: Path, name: str = LOCK) -> Lock:
        """Create `out` and lock it, by the file `name` in it.

        Raises `DirectoryBusy` naming the directory and the holder.
        """
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + LOCK_WAIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(descriptor, 128, 0).decode() or "unknown"
                    os.close(descriptor)
                    raise DirectoryBusy(
                        f"{out}: another run (process {holder}) works here. "
                        "Wait until it is done, or end it."
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                os.close(descriptor)
                if error.errno not in _NO_LOCKS:
                    raise
                raise ValueError(
                    f"{out}: its storage has no file locks ({error.strerror}). Mount it with them "
                    "(NFS: version 4, or lockd; Lustre: -o flock), or choose another directory."
                ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        return cls(descriptor)

    def release(self) -> None:
        with suppress(OSError):
            os.close(self.descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive_lock, (reduction.DupFd(self.descriptor),)


def _receive_lock(descriptor: Any) -> Lock:
    return Lock(descriptor.detach())
