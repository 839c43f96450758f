"""Recipe files -> a checked `Recipe`: bases, model files, overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from eagle_moe.schema import apply_overrides, load_yaml, nearest
from train.recipe.check import check_recipe
from train.recipe.schema import Recipe

REPOSITORY = Path(__file__).parents[2]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.sub=value` overrides, check it whole.

    `base: FILE` at the top takes what the file does not say from another recipe. `model` may be
    the path of a model file, or a mapping with such a `base` and changes. Mappings are merged key
    by key, `null` removes a key. Files are looked for beside the recipe, in the working directory
    and in the repository.
    Raises `FileNotFoundError` or `ValueError` that name the file, the key and the nearest name.
    """
    path = Path(path)
    return parse_recipe(_read(path), str(path), overrides, path.parent)


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, on top of its `base` if it names one."""
    data = load_yaml(path)
    base = data.pop("base", None)
    if base is None:
        return data
    return _merge(_read(_find(base, f"{path}: `base`", path.parent)), data)


def parse_recipe(
    data: Mapping[str, Any], source: str, overrides: Sequence[str] = (), folder: Path = Path()
) -> Recipe:
    """As `load_recipe`, from a mapping; `folder` is where relative model files are looked for."""
    plain = deepcopy(dict(data))
    _check_override_names(plain, overrides)
    # Which model file is read must be known before keys inside it can be overridden.
    first = [item for item in overrides if item.partition("=")[0] in ("model", "model.base")]
    plain = _expand_model(apply_overrides(_with_base(plain), first), source, folder)
    plain = apply_overrides(plain, [item for item in overrides if item not in first])
    recipe = Recipe.parse(plain, source)
    check_recipe(recipe, source)
    return recipe


def _check_override_names(data: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """`stages.sfft.x=1` must not make a stage `sfft`."""
    for override in overrides:
        section, *rest = override.partition("=")[0].split(".")
        names = data.get(section)
        if section not in ("stages", "data") or len(rest) < 2 or not isinstance(names, Mapping):
            continue
        if rest[0] not in names:
            hint = nearest(rest[0], names)
            raise ValueError(f"override {override!r}: `{section}` has no `{rest[0]}`.{hint}")


def _with_base(data: dict[str, Any]) -> dict[str, Any]:
    if isinstance(data.get("model"), str):
        data["model"] = {"base": data["model"]}
    return data


def _expand_model(data: dict[str, Any], source: str, folder: Path) -> dict[str, Any]:
    model = _with_base(data).get("model")
    if not isinstance(model, dict) or "base" not in model:
        return data
    given = {key: value for key, value in model.items() if key != "base"}
    base = load_yaml(_find(model["base"], f"{source}: `model`", folder))
    return {**data, "model": _merge(base, given)}


def _find(name: str, where: str, folder: Path) -> Path:
    places = [folder, Path(), REPOSITORY]
    for place in places:
        if (place / name).is_file():
            return place / name
    looked = ", ".join(str((place / name).resolve()) for place in places)
    raise FileNotFoundError(f"{where}: no file {name} (looked for {looked}).")


def _merge(base: Any, given: Any) -> Any:
    """`given` on top of `base`, by the rules of JSON Merge Patch (RFC 7386)."""
    if not isinstance(given, dict):
        return given
    merged = dict(base) if isinstance(base, dict) else {}
    for key, value in given.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged
