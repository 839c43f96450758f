"""What a checkpoint's own records tell a model card: parts, stages and data, never a local path.

The recipe is read as plain data: its schema belongs to training, which need not be installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from eagle_moe.checkpoint import RECIPE, read_complete, read_provenance
from eagle_moe.hub.details import Details
from eagle_moe.hub.licences import OWN, PartLicence
from eagle_moe.hub.scan import without_local_paths
from eagle_moe.schema import load_yaml

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class PartRow:
    """A part of the model, as it is now and as it came to be."""

    part: str
    parameters: int
    history: str
    licence: str
    sha256: str


@dataclass(frozen=True)
class StageRow:
    """A stage of training as its recipe has it."""

    name: str
    learns: str
    data: str
    length: str
    batch: str
    rate: str


@dataclass(frozen=True)
class DataRow:
    """An entry of the recipe's `data`, and in which stages it was learned from."""

    name: str
    file: str
    stages: str
    source: str
    licence: str


def read_recipe(folder: Path) -> dict[str, Any]:
    """The resolved recipe of a checkpoint; empty if it has none. Raises `ValueError`."""
    return load_yaml(folder / RECIPE) if (folder / RECIPE).is_file() else {}


def part_rows(folder: Path, licences: list[PartLicence]) -> list[PartRow]:
    """Raises `ValueError` if the folder has no records."""
    of = {one.part: one for one in licences}
    return [
        PartRow(
            part=part,
            parameters=record.parameters,
            history=" → ".join([_origin(of[part]), *map(without_local_paths, record.history[1:])]),
            licence=of[part].licence,
            sha256=record.sha256,
        )
        for part, record in read_provenance(folder).items()
    ]


def stage_rows(recipe: Mapping[str, Any], last: str | None) -> list[StageRow]:
    """The stages up to `last`, in order."""
    rows = []
    for name, stage in (recipe.get("stages") or {}).items():
        args = stage.get("args") or {}
        rows.append(
            StageRow(
                name=name,
                learns=", ".join(_learns(stage)),
                data=", ".join(stage.get("data") or ()),
                length=_length(args),
                batch=_batch(stage, args),
                rate=_rate(stage, args),
            )
        )
        if name == last:
            break
    return rows


def data_rows(recipe: Mapping[str, Any], details: Details, stages: list[StageRow]) -> list[DataRow]:
    """Entries that the stages learned from. What nobody recorded is said to be not recorded."""
    rows = []
    for name in data_names(recipe):
        entry = recipe["data"][name]
        used = [stage.name for stage in stages if name in stage.data.split(", ")]
        told = details.data.get(name)
        if used:
            limit = f", first {entry['limit']:,} records" if entry.get("limit") else ""
            rows.append(
                DataRow(
                    name=name,
                    file=PurePath(str(entry.get("path", ""))).name + limit,
                    stages=", ".join(used),
                    source=(told and told.source) or NOT_RECORDED,
                    licence=told.licence if told else NOT_RECORDED,
                )
            )
    return rows


def data_names(recipe: Mapping[str, Any]) -> list[str]:
    """Names of the recipe's data."""
    return list(recipe.get("data") or {})


def last_stage(folder: Path) -> str | None:
    """The stage whose checkpoint this is, if the folder says so."""
    complete = read_complete(folder)
    return complete.stage if complete else None


def _origin(licence: PartLicence) -> str:
    """What a part started from. Of a path only its last name is told."""
    origin = licence.origin
    if not origin:
        return f"origin {NOT_RECORDED}"
    if licence.licence == OWN or licence.source.startswith("https://"):
        return without_local_paths(origin)
    place, colon, story = origin.partition(": ")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not Path(place).exists():
        return origin
    return f"weights made earlier ({PurePath(place).name}){colon}{story}"


def _learns(stage: Mapping[str, Any]) -> list[str]:
    lora = stage.get("lora") or {}
    plain = [part for part in stage.get("trainable") or () if part not in lora]
    adapted = [f"{part} (LoRA, r {(lora[part] or {}).get('r', '?')})" for part in lora]
    return [*plain, *adapted, *(["one run per expert"] if stage.get("per_expert") else [])]


def _length(args: Mapping[str, Any]) -> str:
    if (args.get("max_steps") or -1) > 0:
        return f"{args['max_steps']:,} steps"
    epochs = args.get("num_train_epochs", 3)  # the default of transformers
    return f"{epochs:g} epoch{'s' if epochs != 1 else ''}"


def _batch(stage: Mapping[str, Any], args: Mapping[str, Any]) -> str:
    if stage.get("batch_size"):
        return f"{stage['batch_size']:,}"
    each = args.get("per_device_train_batch_size", 8)  # the default of transformers
    accumulated = args.get("gradient_accumulation_steps", 1)
    return f"{each:,}{f' x {accumulated}' if accumulated != 1 else ''} per device"


def _rate(stage: Mapping[str, Any], args: Mapping[str, Any]) -> str:
    rates = [f"{part} {rate:g}" for part, rate in (stage.get("lr") or {}).items()]
    if not rates and "learning_rate" in args:
        rates = [f"{args['learning_rate']:g}"]
    schedule = args.get("lr_scheduler_type")
    return "; ".join(filter(None, [", ".join(rates) or NOT_RECORDED, schedule]))
