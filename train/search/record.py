"""Which search lives in a folder, and for how long it has been at work."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eagle_moe.checkpoint import replace_text
from eagle_moe.schema import Schema
from train.search.features import FeatureChoice, choose_features
from train.search.inputs import SearchInputs
from train.search.keys import SHORT, digest
from train.search.settings import WITHOUT_EFFECT
from train.stages import WITHOUT_EFFECT as LOGGING
from train.workspace import differences

SEARCH = "search.json"
CLOCK = "clock.json"


class SearchRecord(Schema):
    """`search.json`.

    - `identity`: all that determines the search's results, flat; `code` is part of it.
    - `features`: decided once, because what a disk and a processor do at another time is different.
    """

    code: str
    identity: dict[str, Any]
    features: FeatureChoice
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """Hash of what determines the results."""
        return digest([self.identity, self.features.stages])[:SHORT]


def open_record(out: Path, inputs: SearchInputs, code: str) -> SearchRecord:
    """The record in `out`, which is made if there is none.

    Raises `ValueError` naming what differs if another search lives there.
    """
    path = out / SEARCH
    identity = json.loads(json.dumps(_identity(inputs, code)))
    if path.is_file():
        there = SearchRecord.parse(json.loads(path.read_text(encoding="utf-8")), str(path))
        if there.identity != identity:
            raise ValueError(_refusal(path, there, identity))
        return there
    record = SearchRecord(
        code=code,
        identity=identity,
        features=choose_features(inputs),
        settings=inputs.settings.dump(),
    )
    replace_text(path, json.dumps(record.dump(), indent=1, ensure_ascii=False))
    return record


def _refusal(path: Path, there: SearchRecord, identity: dict[str, Any]) -> str:
    text = (
        f"{path}: another search lives in this folder:\n{differences(there.identity, identity)}\n"
        "Choose another --out, or take these settings back."
    )
    if there.identity["code"] != identity["code"]:
        text += f" To go on as if the code were the same, add code={there.code}."
    return text


def _identity(inputs: SearchInputs, code: str) -> dict[str, Any]:
    settings, recipe = inputs.settings, inputs.recipe.dump()
    for field in ("name", "output_dir", "features_dir", "peak_tflops"):
        del recipe[field]
    for stage in recipe["stages"].values():
        stage["args"] = {k: v for k, v in stage["args"].items() if k not in LOGGING}
    told = {k: v for k, v in settings.dump().items() if k not in WITHOUT_EFFECT}
    told |= {
        "code": code,
        "pool": list(inputs.pool.names),
        "base": list(inputs.pool.base),
        "gpus_per_trial": max(settings.gpus_per_trial, 1),
    }
    return _flat(told | {"recipe": recipe})


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


class WorkClock:
    """Seconds at work over all sittings, kept in `OUT/clock.json` whenever something was done."""

    def __init__(self, out: Path) -> None:
        self._path = out / CLOCK
        told = json.loads(self._path.read_text()) if self._path.is_file() else {}
        self.started: str = told.get("started") or now()
        self._before: float = told.get("wall", 0.0)
        self._begun = time.monotonic()

    @property
    def wall(self) -> float:
        return round(self._before + time.monotonic() - self._begun, 1)

    def note(self) -> None:
        replace_text(self._path, json.dumps({"started": self.started, "wall": self.wall}))


def now() -> str:
    """As people write a date, in UTC."""
    return datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
