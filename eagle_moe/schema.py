"""Typed, frozen configuration: YAML -> validated objects, with errors a person can act on.

Everything that is configured by YAML or by a checkpoint's JSON is a subclass of `Schema`.
Unknown keys are errors that name the nearest valid key; values are checked against their types.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

MANY_NAMES = 30
MOST_CLOSE = 5


class Schema(BaseModel):
    """Base of every configuration object. Immutable; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str) -> Self:
        """Validate `data`; `source` (a file or field) is named in the `ValueError` on failure."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(_explain(cls, error, source)) from None

    def dump(self) -> dict[str, Any]:
        """Plain JSON-serialisable data from which `parse` rebuilds an equal object."""
        return self.model_dump(mode="json")


def nearest(name: str, choices: Iterable[str]) -> str:
    """The likeliest valid name and the others, for use in error messages.

    Of many names only the closest are listed, if there are any close ones.
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=MOST_CLOSE, cutoff=0.5)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    if close and len(known) > MANY_NAMES:
        return f"{hint} Valid: {', '.join(close)} and {len(known) - len(close)} more."
    return f"{hint} Valid: {', '.join(known) or '(none)'}."


def _explain(cls: type[BaseModel], error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            hint = nearest(str(item["loc"][-1]), _fields_at(cls, item["loc"][:-1]))
            lines.append(f"{source}: unknown key `{field}`.{hint}")
        elif item["type"] == "missing":
            lines.append(f"{source}: `{field}` is required.")
        elif isinstance(item["input"], Mapping):  # a whole section: its values would hide the text
            message = item["msg"].removeprefix("Value error, ").rstrip(".")
            lines.append(f"{source}: {f'`{field}`: ' if field else ''}{message}.")
        else:
            lines.append(f"{source}: `{field}` = {item['input']!r}: {item['msg']}.")
    return "\n".join(lines)


def _fields_at(cls: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Field names of the (possibly nested) model that `location` points into."""
    current = cls
    for part in location:
        field = current.model_fields.get(str(part))
        if field is None:
            continue  # a key of dict[str, X] or an index of list[X]: X was found one step before
        nested = _model_in(field.annotation)
        if nested is None:
            return []
        current = nested
    return list(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model among the type arguments of dict[str, X], list[X], X | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    arguments = getattr(annotation, "__args__", ())
    return next((model for model in map(_model_in, arguments) if model), None)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text; this reads it as the number that the author meant."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML text. Raises `ValueError` naming `source` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {error}") from None


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML mapping and apply `key.sub=value` overrides.

    Raises `FileNotFoundError` or `ValueError`, naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Give the path of a YAML file.")
    data = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping at the top, got {type(data).__name__}.")
    return apply_overrides(data, overrides)


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `data` with each `a.b=value` set; values are read as YAML.

    A number in the path indexes a list. Missing mappings on the way are created, so a typo is
    caught by the schema that reads the result.
    """
    result = deepcopy(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r}: write it as key=value or key.sub=value.")
        *parents, last = key.split(".")
        node: Any = result
        for part in parents:
            node = _child(node, part, key)
        value = read_yaml(text, f"override {override!r}")
        if isinstance(node, list):
            node[_index(node, last, key)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ValueError(f"override {override!r}: `{'.'.join(parents)}` has no keys.")
    return result


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if not isinstance(node, dict):
        raise ValueError(f"override `{key}`: `{part}` lies below a plain value.")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(f"override `{key}`: `{part}` is not an index of a list of {len(node)}.")
    return int(part)
