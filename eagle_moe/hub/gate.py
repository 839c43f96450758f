"""The gate: a folder does what its source did, loaded in fresh processes, or it is not released.

The source is watched once, while it is in memory; what was seen goes into `release.json`, so that
a copy that comes back from the Hub years later can be compared with it as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open

from eagle_moe.checkpoint import replace_text, weight_files
from eagle_moe.hub import probe
from eagle_moe.parts import tensor_hash
from eagle_moe.schema import Schema
from eagle_moe.stubs import CONFIG_MAP, PROCESSOR_MAP, stub_files

RELEASE = "release.json"
GATE = "gate.json"

WAYS = {"package": "after `import eagle_moe`", "remote": "with trust_remote_code"}
"""How a folder is loaded, each in a process of its own."""

LOGIT_BOUND = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest difference of a logit from the source's, relative to the largest logit of the row."""
BATCH_BOUND = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
"""The same between a batch and its rows alone, which are computed in another order."""


class Observation(Schema):
    """What `eagle_moe.hub.probe` saw; a field is None if an error came before it.

    - `settings`, `prompts`, `ids`, `canvases` (SHA-256 per image): of the processor, row by row;
      `again`: the same after it was saved and loaded.
    - `image_tokens`: how many tokens the model makes of an image (all lengths that occur).
    - `logits`, `texts`, `batch_logits`, `batch_texts`: row by row, and of all rows as one batch.
    """

    settings: dict[str, Any] | None = None
    prompts: list[str] | None = None
    ids: list[list[int]] | None = None
    canvases: list[list[str]] | None = None
    again: dict[str, Any] | None = None
    dtype: str | None = None
    image_tokens: list[int] | None = None
    logits: list[list[float]] | None = None
    texts: list[str] | None = None
    batch_logits: list[list[float]] | None = None
    batch_texts: list[str] | None = None
    error: str | None = None


class Release(Schema):
    """`release.json`: what a release was made of, and what a copy of it must do.

    - `source`: what kind of folder; `version`: of eagle-moe.
    - `tensors`: name -> hash (`eagle_moe.parts.tensor_hash`).
    - `expected`: the source, watched.
    """

    format: Literal[1] = 1
    version: str
    source: str
    tensors: dict[str, str]
    expected: Observation


class Check(Schema):
    """One thing that was looked at; `finding` says both values if it failed."""

    name: str
    passed: bool
    finding: str


class Verdict(Schema):
    """`gate.json`."""

    format: Literal[1] = 1
    checks: list[Check]
    versions: dict[str, str]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


def watch(model: Any, processor: Any) -> Observation:
    """What a model in memory does; as for a folder, but for `again`."""
    seen = {**probe.observe_processor(processor), **probe.observe_model(model, processor)}
    return Observation.parse(seen, "what the source does")


def read_release(folder: str | Path) -> Release:
    """What is recorded in `folder`. Raises `ValueError` naming it if nothing is."""
    path = Path(folder) / RELEASE
    if not path.is_file():
        raise ValueError(f"{folder}: is no release (no {RELEASE} in it).")
    return Release.parse(json.loads(path.read_text(encoding="utf-8")), str(path))


def check_folder(
    folder: str | Path, release: Release | None = None, device: str = "cpu"
) -> Verdict:
    """Compare `folder` with `release` (default: the one that it records itself).

    Takes two processes that load the model one after the other. Nothing is downloaded.
    """
    folder = Path(folder)
    release = release or read_release(folder)
    checks = [_check_tensors(folder, release), _check_stubs(folder)]
    for way in WAYS:
        checks += compare(way, _watch_folder(folder, way, device), release.expected)
    return Verdict(checks=checks, versions=_versions(device))


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """Put it into `folder`."""
    replace_text(folder / GATE, json.dumps(verdict.dump(), indent=1) + "\n")


def compare(way: str, found: Observation, expected: Observation) -> list[Check]:
    """Everything that `expected` holds, against what was found by loading in `way`."""
    checks = [
        _equal("settings", found.settings, expected.settings),
        _equal("prompts", found.prompts, expected.prompts),
        _equal("token ids", found.ids, expected.ids),
        _equal("canvases", found.canvases, expected.canvases),
        _round_trip(found),
        _equal("dtype", found.dtype, expected.dtype),
        _equal("tokens per image", found.image_tokens, expected.image_tokens),
        _close("logits", found.logits, expected.logits, LOGIT_BOUND, expected.dtype),
        _equal("greedy text", found.texts, expected.texts),
        _close("batch, logits", found.batch_logits, found.logits, BATCH_BOUND, expected.dtype),
    ]
    if expected.dtype == "float32":  # rounded further, two likely tokens may change places
        checks.append(_equal("batch, greedy text", found.batch_texts, found.texts))
    if found.error:
        first = found.error.splitlines()[0]
        checks = [check for check in checks if check.finding != _UNSEEN]
        checks.append(Check(name="loads and runs", passed=False, finding=first))
    return [check.model_copy(update={"name": f"{WAYS[way]}: {check.name}"}) for check in checks]


_UNSEEN = "not seen"


def _equal(name: str, found: Any, expected: Any) -> Check:
    if found is None:
        return Check(name=name, passed=False, finding=_UNSEEN)
    if found == expected:
        return Check(name=name, passed=True, finding="equal")
    where, one, other = next(_differences(found, expected, ""))
    told = f"{where.lstrip('.') + ': ' if where else ''}{_short(one)} instead of {_short(other)}"
    return Check(name=name, passed=False, finding=told)


def _differences(found: Any, expected: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """(place, found, expected) of the innermost values that differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected}):
            yield from _differences(found.get(key), expected.get(key), f"{where}.{key}")
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for index, pair in enumerate(zip(found, expected, strict=True)):
            yield from _differences(*pair, f"{where}[{index}]")
    elif found != expected:
        yield where, found, expected


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} values"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:110]}... ({len(text)} characters)"


def _round_trip(found: Observation) -> Check:
    before = {key: getattr(found, key) for key in ("settings", "prompts", "ids", "canvases")}
    return _equal("processor saved and loaded again", found.again, before)


def _close(
    name: str,
    found: list[list[float]] | None,
    expected: list[list[float]] | None,
    bounds: dict[str, float],
    dtype: str | None,
) -> Check:
    if found is None or expected is None:
        return Check(name=name, passed=False, finding=_UNSEEN)
    bound = bounds.get(dtype or "", bounds["float32"])
    worst = largest_difference(found, expected)
    told = f"largest relative difference {worst:.1e}, allowed {bound:.0e}"
    return Check(name=name, passed=worst <= bound, finding=told)  # a nan does not pass


def largest_difference(found: list[list[float]], expected: list[list[float]]) -> float:
    """Of logits, relative to the largest one of the row; nan if any is not a number."""
    one, other = np.array(found), np.array(expected)
    if one.shape != other.shape:
        return float("inf")
    return float((np.abs(one - other).max(1) / np.abs(other).max(1)).max())


def _check_tensors(folder: Path, release: Release) -> Check:
    name = "weights"
    try:
        found = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    found[key] = tensor_hash(file.get_tensor(key))
    except Exception as error:  # safetensors has an error of its own for each kind of damage
        return Check(name=name, passed=False, finding=f"cannot be read: {error}")
    for what, names in (
        ("missing", release.tensors.keys() - found.keys()),
        ("not of the source", found.keys() - release.tensors.keys()),
        ("changed", {key for key in found if found[key] != release.tensors.get(key)}),
    ):
        if names:
            first = min(names)
            hashes = f"{found.get(first, 'none')[:12]} instead of "
            hashes += release.tensors.get(first, "none")[:12]
            told = f"{len(names)} of {len(release.tensors)} {what}, first {first} ({hashes})"
            return Check(name=name, passed=False, finding=told)
    return Check(name=name, passed=True, finding=f"{len(found)} tensors, each with its hash")


def _check_stubs(folder: Path) -> Check:
    name = "files for trust_remote_code"
    for file, content in stub_files().items():
        path = folder / file
        if not path.is_file():
            return Check(name=name, passed=False, finding=f"{file} is missing")
        if path.read_text(encoding="utf-8") != content:
            return Check(name=name, passed=False, finding=f"{file} is not what is saved with it")
    for file, auto_map in (("config.json", CONFIG_MAP), ("processor_config.json", PROCESSOR_MAP)):
        path = folder / file
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        check = _equal(name, data.get("auto_map", {}), auto_map)
        if not check.passed:
            return check.model_copy(update={"finding": f"{file}: auto_map: {check.finding}"})
    return Check(name=name, passed=True, finding="all there")


def _watch_folder(folder: Path, way: str, device: str) -> Observation:
    """Load `folder` in a fresh process; its code cache is empty, and it cannot download."""
    with tempfile.TemporaryDirectory(prefix="eagle-moe-gate-") as place:
        out = Path(place, "seen.json")
        done = subprocess.run(
            [sys.executable, "-P", probe.__file__, str(folder.resolve()), way, device, str(out)],
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "HF_MODULES_CACHE": str(Path(place, "modules")),
                "TRANSFORMERS_VERBOSITY": "error",
            },
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
        )
        if not out.is_file():
            last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
            return Observation(error=last)
        seen = json.loads(out.read_text(encoding="utf-8"))
    return Observation.parse(seen, "what the folder does")


def _versions(device: str) -> dict[str, str]:
    import platform

    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
    }
