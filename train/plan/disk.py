"""How fast a disk is and how much room it has, found out with a small file that is removed."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TESTED = 64 << 20
"""Bytes that are written and read."""


@dataclass(frozen=True)
class Disk:
    """The disk that `folder` is on: `read` and `write` in bytes per second, `free` in bytes."""

    folder: Path
    read: float
    write: float
    free: int


def measure_disk(folder: Path, piece: int) -> Disk:
    """Measure where `folder` is, or will be; reads are of `piece` bytes at random places.

    What was just written is forgotten by the operating system first, where it lets itself be told
    so. What it goes on to keep in memory is read faster than this says.
    """
    there = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    piece = min(piece, TESTED)
    count = TESTED // piece
    block = random.Random(0).randbytes(piece)  # not zeros, which some file systems do not store
    with tempfile.TemporaryFile(dir=there, buffering=0) as file:
        start = time.perf_counter()
        for _ in range(count):
            file.write(block)
        os.fsync(file.fileno())
        write = count * piece / (time.perf_counter() - start)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        places = random.Random(0).sample(range(count), count)
        start = time.perf_counter()
        for place in places:
            os.pread(file.fileno(), piece, place * piece)
        read = count * piece / (time.perf_counter() - start)
    return Disk(folder, read, write, shutil.disk_usage(there).free)
