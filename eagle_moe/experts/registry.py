"""Names -> experts: presets, YAML entries, `timm:`/`open_clip:` names, and plug-ins."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from eagle_moe.experts.base import ExpertSpec, VisionExpert
from eagle_moe.registry import Registry
from eagle_moe.schema import nearest

EXPERTS: Registry[type[VisionExpert]] = Registry("vision expert")
PLUGIN_GROUP = "eagle_moe.experts"
PLUGIN_ENV = "EAGLE_MOE_EXPERTS"

E = TypeVar("E", bound=type[VisionExpert])


def register_expert(kind: str) -> Callable[[E], E]:
    """Class decorator: `@register_expert("clip")` makes `kind: clip` valid in configurations."""
    return EXPERTS.register(kind)  # type: ignore[return-value]


@cache
def load_plugins() -> None:
    """Import expert modules from outside the package, once per process.

    They are named by the entry point group `eagle_moe.experts` of installed packages, and by the
    environment variable `EAGLE_MOE_EXPERTS` (comma-separated module names): local code that the
    person installed or named, never code from a checkpoint. Raises `ValueError` if a module named
    by the environment cannot be imported.
    """
    for entry in entry_points(group=PLUGIN_GROUP):
        entry.load()
    for module in filter(None, os.environ.get(PLUGIN_ENV, "").split(",")):
        try:
            importlib.import_module(module.strip())
        except ImportError as error:
            raise ValueError(
                f"{PLUGIN_ENV}: cannot import {module.strip()!r} ({error}). Install it, or put its"
                " folder on PYTHONPATH."
            ) from error


def expert_class(kind: str) -> type[VisionExpert]:
    """The class of a kind. `family:model` kinds are served by the class registered as `family:`."""
    family, colon, _ = kind.partition(":")
    key = family + colon
    if key not in EXPERTS:
        load_plugins()
    return EXPERTS[key]


def presets() -> dict[str, tuple[str, dict[str, Any]]]:
    """All presets: name -> (kind, {"view", "arch", "card"})."""
    load_plugins()
    return {
        name: (kind, preset) for kind in EXPERTS for name, preset in EXPERTS[kind].presets.items()
    }


def resolve_expert(entry: str | Mapping[str, Any]) -> ExpertSpec:
    """Turn a configuration entry into a full `ExpertSpec`.

    `entry` is a preset's name, a `timm:`/`open_clip:` kind, or a mapping with any of `name`,
    `preset`, `kind`, `view`, `arch`, `card`, where what is given overrides the preset.
    A resolved spec resolves to itself. Raises `ValueError` with the nearest valid name.
    """
    given = {"preset" if ":" not in entry else "kind": entry} if isinstance(entry, str) else entry
    data = dict(given)
    where = f"expert {data.get('name') or data.get('preset') or data.get('kind') or '?'}"
    base: dict[str, Any] = {}
    preset = data.pop("preset", None)
    if preset is not None:
        known = presets()
        if preset not in known:
            raise ValueError(f'{where}: no expert "{preset}".{nearest(preset, known)}')
        kind, base = known[preset]
        data.setdefault("kind", kind)
    if "kind" not in data:
        raise ValueError(f"{where}: give `preset` (one of {', '.join(presets())}) or `kind`.")
    cls = expert_class(data["kind"])
    if not base:
        base = cls.defaults(data["kind"])
    for part in ("view", "arch", "card"):
        data[part] = {**base.get(part, {}), **(data.get(part) or {})}
    data.setdefault("name", data["kind"].replace(":", "_").replace(".", "_").replace("/", "_"))
    spec = ExpertSpec.parse(data, where)
    return spec.model_copy(update={"arch": cls.Arch.parse(spec.arch, f"{where}: arch").dump()})


def build_expert(spec: ExpertSpec) -> VisionExpert:
    """Build an expert with random weights, on the current default device (meta included).

    Raises `ValueError` if view and architecture do not fit each other.
    """
    expert = expert_class(spec.kind)(spec)
    expert.apply(expert.init_weights)  # type: ignore[arg-type]
    return expert
