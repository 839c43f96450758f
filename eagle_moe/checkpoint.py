"""Checkpoint folders: complete or absent, self-describing, and read strictly.

A folder holds what `from_pretrained` and `AutoProcessor` read, and beside it

| file              | holds                                                                      |
|-------------------|----------------------------------------------------------------------------|
| `recipe.yaml`     | the resolved recipe                                                        |
| `provenance.json` | per part: hash of its weights, where they came from, what was done to them |
| `complete.json`   | written last: every file with its size, and what determined the result     |

It is written under a hidden name beside its own and renamed into place.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from eagle_moe.parts import part_of
from eagle_moe.schema import Schema

COMPLETE = "complete.json"
PROVENANCE = "provenance.json"
RECIPE = "recipe.yaml"
WEIGHTS = "model.safetensors"
EXPERT_WEIGHTS = "expert.safetensors"
"""Weights of one expert in a folder of its own."""
EXPERT_SPEC = "expert.json"
"""The `ExpertSpec` of the expert in the same folder."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class SaveFailed(OSError):
    """A checkpoint could not be written; what was there before is intact."""


class Complete(Schema):
    """`complete.json`.

    - `identity`: what determined the result (recipe, data, sources), flat, for comparison.
    - `files`: relative path -> bytes.
    """

    format: Literal[1] = 1
    stage: str
    expert: str | None = None
    identity: dict[str, Any]
    files: dict[str, int] = {}


class PartRecord(Schema):
    """`provenance.json`, one part.

    - `sha256`: of its tensors in this checkpoint (`eagle_moe.parts.part_hashes`).
    - `parameters`: how many.
    - `history`: where its weights were first taken from, then each stage that changed them.
    """

    sha256: str
    parameters: int
    history: list[str]


@contextmanager
def write_checkpoint(target: Path, complete: Complete) -> Iterator[Path]:
    """Yields an empty folder beside `target`; when the block ends it becomes `target`, complete.

    If anything fails the folder is removed and `target` is as it was before. Raises `SaveFailed`
    if the disk is full, and lets other errors through.
    """
    draft = target.with_name(f".{target.name}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        files = {
            str(path.relative_to(draft)): path.stat().st_size
            for path in sorted(draft.rglob("*"))
            if path.is_file()
        }
        write_json(draft / COMPLETE, complete.model_copy(update={"files": files}).dump())
        for name in files:  # safetensors makes files that their owner alone can read
            (draft / name).chmod((draft / COMPLETE).stat().st_mode)
        _sync(draft)
        _replace(draft, target)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if _is_full(error):
            raise SaveFailed(errno.ENOSPC, _full_message(target, error)) from error
        raise


def write_json(path: Path, data: Any) -> None:
    """Readable JSON."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old content or the new one, and never a part."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text, encoding="utf-8")
    _sync_one(beside)
    beside.replace(path)


def read_complete(folder: Path) -> Complete | None:
    """The mark of a complete checkpoint, None where there is none.

    Raises `ValueError` if there is one but files are missing or have another size, as after an
    interrupted copy.
    """
    path = folder / COMPLETE
    if not path.is_file():
        return None
    complete = Complete.parse(json.loads(path.read_text(encoding="utf-8")), str(path))
    for name, size in complete.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"{folder}: {name} {state}. The checkpoint is damaged: copy it again.")
    return complete


def read_provenance(folder: Path) -> dict[str, PartRecord]:
    """Part -> record. Raises `ValueError` naming the folder if there is none."""
    path = folder / PROVENANCE
    if not path.is_file() and (folder / COMPLETE).is_file():
        raise ValueError(
            f"{folder}: a resume point of an unfinished run, with no more than that run changes. "
            "Finish the run, then give the folder of its stage."
        )
    if not path.is_file():
        raise ValueError(
            f"{folder}: no {PROVENANCE}, so it is not a checkpoint of `train.run`. A plain "
            "language model or expert goes into the recipe's `init`."
        )
    data = json.loads(path.read_text(encoding="utf-8"))
    return {part: PartRecord.parse(entry, f"{path}: {part}") for part, entry in data.items()}


def write_provenance(folder: Path, parts: Mapping[str, PartRecord]) -> None:
    write_json(folder / PROVENANCE, {part: record.dump() for part, record in parts.items()})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`, one or several shards.

    Raises `ValueError` naming the folder if there is none, or if a shard is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        raise ValueError(f"{folder}: no {WEIGHTS} and no {index.name} in it.")
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise ValueError(f"{folder}: {index.name} names {shard}, which is missing.")
    return [folder / shard for shard in shards]


def read_parts(folder: Path, parts: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of `parts` in a checkpoint; the other ones are not read from disk."""
    parts = set(parts)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if part_of(name) in parts]  # noqa: SIM118
            tensors.update({name: file.get_tensor(name) for name in names})
    return tensors


def save_expert(folder: Path, spec: Schema, tensors: Mapping[str, Tensor]) -> None:
    """Write one expert's folder: its `ExpertSpec` and its weights, whole or not at all.

    Raises `SaveFailed` if the disk is full; weights that were there before are then intact.
    """
    draft = folder / f".{EXPERT_WEIGHTS}.writing"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plain = {name: value.contiguous() for name, value in tensors.items()}
        save_file(plain, draft, metadata={"format": "pt"})
        _sync_one(draft)
        write_json(folder / EXPERT_SPEC, spec.dump())
        draft.replace(folder / EXPERT_WEIGHTS)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if _is_full(error):
            raise SaveFailed(errno.ENOSPC, _full_message(folder, error)) from error
        raise


def remove_drafts(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left half written or half removed in `folder`, for `name`."""
    for state in ("writing", "replaced", "retired"):
        for draft in folder.glob(f".{name}.{state}"):
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink(missing_ok=True)


def _replace(draft: Path, target: Path) -> None:
    """Rename `draft` to `target`; a folder that is there makes way, and comes back on failure."""
    old = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync_one(target.parent)


def _sync(folder: Path) -> None:
    """Make sure the bytes are on the disk before the rename is."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full(error: BaseException) -> bool:
    """Whether `error` says that no more can be written, in whichever library's words."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    # safetensors reports "... (os error 28)". torch.save does not say why it could not write.
    signs = [*(f"os error {code})" for code in _FULL), "iostream error", "inline_container.cc"]
    return any(sign in str(error) for sign in signs)


def _full_message(target: Path, error: BaseException) -> str:
    free = 0
    with suppress(OSError):
        free = shutil.disk_usage(target.parent).free
    return (
        f"{target}: no room to save it ({free / 2**20:.0f} MiB free on that disk): {error}. "
        "Nothing was changed there, and earlier checkpoints are intact. Free space or choose "
        "another folder (a recipe's `output_dir`), then run the same command: a run continues."
    )
