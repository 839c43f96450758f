"""One folder with everything that using a model needs, out of what training or peft has left.

| given                                  | becomes                                               |
|----------------------------------------|-------------------------------------------------------|
| a finished checkpoint of `train.run`   | its weights as they are: what engines held in pieces  |
|                                        | was put together, and LoRA merged, when it was saved  |
| a folder of `save_pretrained`          | its weights as they are                               |
| adapters of peft, with a base beside   | the base with the adapters merged into it             |

Weight files are copied byte for byte where they are small enough, so that scores of the source are
scores of the release. Paths of the machine are taken out of the records.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.logging import disable_progress_bar

from eagle_moe.answer import Answerer
from eagle_moe.checkpoint import (
    COMPLETE,
    PROVENANCE,
    RECIPE,
    Complete,
    PartRecord,
    read_complete,
    read_provenance,
    weight_files,
    write_checkpoint,
    write_json,
    write_provenance,
)
from eagle_moe.hub.details import DETAILS
from eagle_moe.hub.experts import check_hashes
from eagle_moe.hub.gate import RELEASE, Observation, Release, largest_difference, watch
from eagle_moe.hub.records import read_recipe
from eagle_moe.hub.scan import without_local_paths
from eagle_moe.interop.importer import check_room
from eagle_moe.parts import model_tensors, part_hashes, part_of, tensor_hashes

ADAPTERS = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PIECES = ("global_step*", "*zero_pp_rank_*", "*.distcp", "pytorch_model_fsdp*", "*_optim_states.pt")
"""What DeepSpeed and FSDP leave of a model that nobody put together."""
MERGE_BOUND = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 6e-2}
"""Largest relative change of a logit by merging adapters, which rounds the sum once."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Source:
    """A model to release, in memory. `kind`: what it was given as."""

    folder: Path
    kind: str
    answerer: Answerer
    expected: Observation
    records: dict[str, PartRecord]
    copied: bool
    """Whether the weights in memory are those of the files in `folder`."""


def consolidate(
    folder: str | Path,
    out: str | Path,
    shard_size: str = "5GB",
    card: str | Path | None = None,
    device: str = "cpu",
) -> Release:
    """Make the releasable folder `out` of the model in `folder`, whole or not at all.

    `card`: a `card.yaml` that takes the place of the folder's own. A release that is at `out`
    already is replaced, anything else is not.

    Raises `ValueError` for a folder that is no finished model, or a taken `out`; `OSError` if the
    disk is full.
    """
    folder, out = Path(folder), Path(out)
    check_out(folder, out)
    limit = read_size(shard_size)
    if card is not None and not Path(card).is_file():
        raise FileNotFoundError(f"{card}: no such file. Give the path of a card.yaml.")
    source = read_source(folder, device)
    model = source.answerer.model.to("cpu")
    tensors = model_tensors(model)
    check_room(out, sum(value.nbytes for value in tensors.values()))
    hashes = tensor_hashes(tensors)
    release = Release(
        version=_version(), source=source.kind, tensors=hashes, expected=source.expected
    )
    with write_checkpoint(out, _complete(folder)) as draft:
        _write_weights(source, draft, limit, shard_size)
        source.answerer.processor.save_pretrained(draft)
        _write_records(source, draft, part_hashes(hashes))
        details = Path(card) if card is not None else folder / DETAILS
        if details.is_file():
            shutil.copyfile(details, draft / DETAILS)
        write_json(draft / RELEASE, release.dump())
    return release


def check_out(folder: Path, out: Path) -> None:
    """Raise `ValueError` if `out` holds something that is not a release, or the source itself."""
    if out.resolve() == folder.resolve() or out.resolve() in folder.resolve().parents:
        raise ValueError(f"--out {out}: the model is in there. Give another folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / RELEASE).is_file():
        raise ValueError(
            f"--out {out}: exists already and is no release (no {RELEASE} in it). Remove it, or "
            "give another folder."
        )


def read_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `500MB`. Raises `ValueError`."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in UNITS or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise ValueError(f"--shard-size {text}: write a size such as 5GB or 500MB.")
    return int(float(number) * UNITS[unit])


def read_source(folder: Path, device: str = "cpu") -> Source:
    """Load what is to be released and watch it. Raises `ValueError` saying what to do instead."""
    disable_progress_bar()
    _check_kind(folder)
    if (folder / ADAPTERS).is_file():
        return _read_adapters(folder, device)
    read_complete(folder)
    answerer = Answerer.load(folder, device=device)
    if (folder / PROVENANCE).is_file() or (folder / COMPLETE).is_file():
        records = read_provenance(folder)  # says so if it is a resume point
        check_hashes(folder)
        kind = "finished checkpoint"
    else:
        records = _unrecorded(answerer.model)
        kind = "saved model"
    expected = watch(answerer.model, answerer.processor)
    return Source(folder, kind, answerer, expected, records, copied=True)


def _check_kind(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. Give the folder of a model.")
    pieces = [path.name for pattern in PIECES for path in folder.glob(pattern)]
    if pieces and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: a model in pieces ({pieces[0]}). Finish the run with `make train`, which "
            "puts the pieces together, then give the folder of its stage."
        )
    if (folder / COMPLETE).is_file() and not (folder / "config.json").is_file():
        read_provenance(folder)  # says so if it is a resume point
    config = folder / "config.json"
    fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    kind = fields.get("model_type", "eagle_moe")
    if kind != "eagle_moe":
        raise ValueError(
            f"{folder}: is a model of the type {kind}, not eagle_moe. An official Eagle release "
            "becomes one with `eagle-moe import`."
        )


def _read_adapters(folder: Path, device: str) -> Source:
    """A base and peft's adapters, which are merged."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(
            f"{folder}: adapters are merged by peft: pip install 'eagle-moe[train]' ({error})"
        ) from None
    base = _base_of(folder)
    plain = Answerer.load(base, device=device)
    before = tensor_hashes(model_tensors(plain.model))
    records = read_provenance(base) if (base / PROVENANCE).is_file() else _unrecorded(plain.model)
    adapted = PeftModel.from_pretrained(plain.model, str(folder)).eval()
    unmerged = watch(adapted, plain.processor)
    merged = adapted.merge_and_unload()
    expected = watch(merged, plain.processor)
    _check_merge(folder, unmerged, expected)
    after = tensor_hashes(model_tensors(merged))
    if set(before) != set(after):
        raise ValueError(f"{folder}: adapters that add weights of their own cannot be merged.")
    changed = {part_of(name) for name in after if after[name] != before[name]}
    for part in changed:
        history = [*records[part].history, f"adapters {folder.resolve().name} (peft)"]
        records[part] = records[part].model_copy(update={"history": history})
    answerer = Answerer(merged, plain.processor)
    return Source(base, "adapters, merged", answerer, expected, records, copied=False)


def _base_of(folder: Path) -> Path:
    name = json.loads((folder / ADAPTERS).read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder}: no {ADAPTER_WEIGHTS} in it. Other formats are not read.")
    if not name or not Path(name).is_dir():
        raise ValueError(
            f"{folder / ADAPTERS}: base_model_name_or_path = {name!r} is no folder here. Download "
            "the base, and write its folder there."
        )
    return Path(name)


def _check_merge(folder: Path, unmerged: Observation, merged: Observation) -> None:
    """Merging must not change what the model does by more than the rounding of a sum."""
    assert unmerged.logits is not None and merged.logits is not None
    worst = largest_difference(merged.logits, unmerged.logits)
    bound = MERGE_BOUND.get(merged.dtype or "", MERGE_BOUND["float32"])
    if not worst <= bound:
        raise ValueError(
            f"{folder}: merging the adapters changes logits by {worst:.1e} of the largest "
            f"(allowed {bound:.0e}): their kind cannot be merged."
        )


def _unrecorded(model: Any) -> dict[str, PartRecord]:
    """Records of weights of which nobody wrote down where they came from."""
    tensors = model_tensors(model)
    hashes = part_hashes(tensor_hashes(tensors))
    sizes = dict.fromkeys(hashes, 0)
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] += parameter.numel()
    return {
        part: PartRecord(sha256=sha256, parameters=sizes[part], history=[])
        for part, sha256 in hashes.items()
    }


def _write_weights(source: Source, draft: Path, limit: int, shard_size: str) -> None:
    model = source.answerer.model
    files = weight_files(source.folder) if source.copied else []
    if files and max(path.stat().st_size for path in files) <= limit:
        model.config.save_pretrained(draft)
        model.generation_config.save_pretrained(draft)
        for path in [*files, *source.folder.glob("*.safetensors.index.json")]:
            shutil.copyfile(path, draft / path.name)
    else:
        model.save_pretrained(draft, max_shard_size=shard_size)


def _write_records(source: Source, draft: Path, hashes: Mapping[str, str]) -> None:
    records = {
        part: record.model_copy(update={"sha256": hashes[part], "history": _plain(record.history)})
        for part, record in source.records.items()
    }
    write_provenance(draft, records)
    if recipe := read_recipe(source.folder):
        text = yaml.safe_dump(without_local_paths(recipe), sort_keys=False, allow_unicode=True)
        (draft / RECIPE).write_text(text, encoding="utf-8")


def _plain(history: Iterable[str]) -> list[str]:
    return without_local_paths(list(history))


def _complete(folder: Path) -> Complete:
    complete = read_complete(folder)
    if complete is None:
        return Complete(stage="release", identity={})
    identity = without_local_paths(json.loads(json.dumps(complete.identity)))
    return complete.model_copy(update={"identity": identity})


def _version() -> str:
    try:
        return version("eagle-moe")
    except PackageNotFoundError:
        return "0+unknown"
