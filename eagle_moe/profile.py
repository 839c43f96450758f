"""Profiles: which pixels the experts see and how their maps meet, as data beside the sizes.

`release` does what the official Eagle release does, number for number; `native` does what each
expert was trained for. docs/profiles.md has them side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagle_moe.experts import presets
from eagle_moe.schema import Schema, load_yaml, nearest

PROFILES = Path(__file__).parent / "profiles"


class ExpertProfile(Schema):
    """What a profile says of every expert of one kind; fields as in `ExpertSpec`."""

    view: dict[str, Any] = {}
    arch: dict[str, Any] = {}


class Profile(Schema):
    """Fields of a model file that it fills in where the model file is silent."""

    canvas: dict[str, Any] = {}
    experts: dict[str, ExpertProfile] = {}
    """By kind of expert; a kind that is not named keeps its preset."""
    fusion: dict[str, Any] = {}
    connector: dict[str, Any] = {}
    templates: dict[str, str] = {}
    """Chat template that a model file names -> the one that is used instead."""

    def fill(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `model` (of a `ModelSpec`) with those of the profile below them.

        Filling what it gives changes nothing more.
        """
        filled = dict(model)
        for field in ("canvas", "fusion", "connector"):
            ours, given = getattr(self, field), model.get(field) or {}
            another = "kind" in given and given["kind"] != ours.get("kind", given["kind"])
            filled[field] = dict(given) if another else {**ours, **given}
        filled["experts"] = [self._expert(entry) for entry in model.get("experts") or []]
        if (template := model.get("template")) in self.templates:
            filled["template"] = self.templates[template]
        return filled

    def _expert(self, entry: str | Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(entry, str):
            entry = {"preset" if ":" not in entry else "kind": entry}
        ours = self.experts.get(entry.get("kind") or _kind_of(entry.get("preset")))
        if ours is None:
            return dict(entry)
        return {
            **entry,
            "view": {**ours.view, **(entry.get("view") or {})},
            "arch": {**ours.arch, **(entry.get("arch") or {})},
        }


def _kind_of(preset: Any) -> str:
    """The kind of a preset; "" for an unknown one, of which `resolve_expert` says what is wrong."""
    known = presets()
    return known[preset][0] if preset in known else ""


def read_profile(name: str) -> Profile:
    """The profile `name` (`release`, `native`) or that of a YAML file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in PROFILES.glob("*.yaml"))
        raise ValueError(f'profile: no "{name}".{nearest(name, known)} Or give a .yaml file.')
    return Profile.parse(load_yaml(path), str(path))
