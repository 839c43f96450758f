"""What was found out about data files, kept beside them: where records lie, how long they are.

An index is a folder of arrays, named after the files it describes as they are now (size, time of
the last change, samples of their content). Changed files make another name, so an index older than
its data is never read; it is made anew. It lies beside the data, or, where that cannot be written
to, under `cache_home`.

    data/.train.jsonl.index/<state of the file>/about.json
                                                spans.<crc32>.npy
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = 1
"""Of what is kept; another one is not found, and made anew."""

_DRAFT = ".draft-"
_BLOCK = 4096
_BLOCKS = 64
_WHOLE = 1 << 20  # files up to this many bytes are compared whole


def cache_home() -> Path:
    """For indices that cannot lie beside their data: `EAGLE_MOE_CACHE`, or the user's cache."""
    told = os.environ.get("EAGLE_MOE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(told) if told else Path(base, "eagle_moe")


class Index:
    """Arrays about `files`, found by the state that the files are in when this is made.

    `name` is the data set's path as a person wrote it: a file, a folder, or a pattern.
    Opening reads a few blocks of each file and no array. Raises `OSError` for missing files.
    """

    def __init__(self, name: str | Path, files: Sequence[Path]) -> None:
        self.name = str(name)
        self.files = list(files)
        self.state = _state(self.files)
        self._homes = _homes(Path(name))

    # -- reading

    def about(self) -> dict[str, Any] | None:
        """What `create` was told, or None: there is no index of these files as they are."""
        for home in self._homes:
            path = home / self.state / "about.json"
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                text = path.read_text(encoding="utf-8")
                try:
                    return json.loads(text)
                except ValueError:
                    raise ValueError(_damaged(path)) from None
        return None

    def array(self, name: str) -> NDArray[Any] | None:
        """The array kept as `name`, memory-mapped; None if there is none.

        Raises `ValueError`, naming the file and the remedy, if it is not what was written.
        """
        for home in self._homes:
            for path in sorted((home / self.state).glob(f"{name}.*.npy")):
                with contextlib.suppress(FileNotFoundError):  # replaced just now by another process
                    return _open(path)
        return None

    # -- writing

    def create(self, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
        """Write the first arrays and what to know about them; remove those of older states."""
        home = self._writable()
        draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=home))
        draft.chmod(0o755)  # other people may share the data
        for name, array in arrays.items():
            _write(draft, name, array)
        about = {"version": VERSION, "path": self.name, **about}
        (draft / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        try:
            draft.rename(home / self.state)
        except OSError:  # another process was faster: its index is as good
            shutil.rmtree(draft)
        for other in home.iterdir():
            if other.is_dir() and other.name != self.state and not other.name.startswith(_DRAFT):
                shutil.rmtree(other, ignore_errors=True)

    def store(self, name: str, array: NDArray[Any]) -> None:
        """Keep `array` as `name`, in place of an older one; whole or not at all."""
        folder = self._writable() / self.state
        folder.mkdir(exist_ok=True)
        kept = _write(folder, name, array)
        for path in folder.glob(f"{name}.*.npy"):
            if path.name != kept:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time, so that the ranks of a run do not all do the same work."""
        with (self._writable() / "lock").open("w") as file:
            # some network file systems have no locks; double work does no harm
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _writable(self) -> Path:
        for home in self._homes:
            with contextlib.suppress(OSError):
                home.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=home):
                    return home
        places = " nor in ".join(str(home) for home in self._homes)
        raise ValueError(
            f"{self.name}: its index can be written neither in {places}. "
            "Name a folder that can be written to in EAGLE_MOE_CACHE."
        )


def identity(*told: Any) -> str:
    """A short name for what `told` says, the same in every process."""
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def chunks(
    path: Path, digest: Any, advance: Callable[[int], None], size: int = 1 << 20
) -> Iterator[bytes]:
    """The bytes of a file, piece by piece; `digest` and `advance` get to know them."""
    with path.open("rb") as file:
        while piece := file.read(size):
            digest.update(piece)
            advance(len(piece))
            yield piece


def _state(files: Sequence[Path]) -> str:
    """Sizes, times and samples of the content of `files`, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(f"{VERSION} {len(files)}".encode(), digest_size=16)
    blocks = max(2, _BLOCKS // max(len(files), 1))
    for path in files:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
            for start, length in _samples(status.st_size, blocks if len(files) > 1 else _BLOCKS):
                digest.update(os.pread(file.fileno(), length, start))
    return digest.hexdigest()


def _samples(size: int, blocks: int) -> list[tuple[int, int]]:
    """Where to look: the whole of a small file, first and last block and some between of others."""
    if size <= _WHOLE and blocks == _BLOCKS:
        return [(0, size)]
    starts = np.linspace(0, max(size - _BLOCK, 0), blocks).astype(np.int64)
    return [(int(start), _BLOCK) for start in starts]


def _homes(path: Path) -> list[Path]:
    """Folders that may hold the index of `path`, in order of preference."""
    beside = path / ".index" if path.is_dir() else path.with_name(f".{_plain(path.name)}.index")
    place = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    return [beside, cache_home() / "index" / f"{_plain(path.name)}-{place}"]


def _plain(name: str) -> str:
    """A pattern's name without what a shell would read as one."""
    return name.translate(str.maketrans("*?[]{}", "______"))


def _write(folder: Path, name: str, array: NDArray[Any]) -> str:
    """Write one array; its file's name ends in the checksum of the file."""
    handle, draft = tempfile.mkstemp(prefix=_DRAFT, dir=folder)
    with os.fdopen(handle, "wb") as file:
        np.save(file, array, allow_pickle=False)
    os.chmod(draft, 0o644)
    kept = f"{name}.{_checksum(Path(draft))}.npy"
    os.replace(draft, folder / kept)
    return kept


def _open(path: Path) -> NDArray[Any]:
    if _checksum(path) != path.name.split(".")[-2]:
        raise ValueError(_damaged(path))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _checksum(path: Path) -> str:
    """CRC-32 of a file, read without mapping it, so that its pages do not count as our memory."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"


def _damaged(path: Path) -> str:
    return (
        f"{path}: the index is damaged. Remove the folder {path.parent} and start again: it is "
        "made anew from the data. Have a look at the disk, too."
    )
