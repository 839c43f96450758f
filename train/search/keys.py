"""What determines a result, as a hash: of a stage, of a trial, of the code that makes them."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENTRIES = ("train.run", "eval.run")
"""What makes checkpoints and scores: with all that they import, the code that matters."""
APART = ("train.jobs",)
"""How jobs are run and shown changes no result."""
LIBRARIES = (
    "accelerate",
    "deepspeed",
    "open_clip_torch",
    "peft",
    "safetensors",
    "timm",
    "tokenizers",
    "torch",
    "transformers",
)
"""Whose versions count as code."""
SHORT = 16
"""Hexadecimal digits of a key in the name of a folder: enough for 4 billion of them."""


def digest(value: Any) -> str:
    """SHA-256 of plain data, however its mappings are ordered."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def code_version() -> str:
    """Hash of the code behind trials, whatever its comments, docstrings and layout, and of the
    versions of the libraries under it."""
    from eval.identity import library_versions

    versions = {k: v for k, v in library_versions().items() if k in (*LIBRARIES, "python")}
    return digest([source_hashes(), versions])[:SHORT]


@cache
def source_hashes() -> dict[str, str]:
    """Module or template -> hash, of all that `ENTRIES` import, directly or not."""
    found: dict[str, str] = {}
    waiting = list(ENTRIES)
    while waiting:
        module = waiting.pop()
        path = _file_of(module)
        if path is None or module in found or module.startswith(APART):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        waiting += _imported(tree)
        waiting += [module.rpartition(".")[0]] if "." in module else []
        found[module] = meaning_of(tree)
    for path in sorted(ROOT.glob("eagle_moe/templates/*.jinja")):
        found[str(path.relative_to(ROOT))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def meaning_of(tree: ast.Module) -> str:
    """Hash of what a module does: comments, docstrings and layout do not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [each for each in node.body if not _is_text(each)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(node: ast.stmt) -> bool:
    """A string that stands alone: a docstring, or one below a field."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _imported(tree: ast.Module) -> Iterator[str]:
    """Names of modules that may be imported anywhere in a file, of this repository or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def _file_of(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    places = (base.with_suffix(".py"), base / "__init__.py")
    return next((place for place in places if place.is_file()), None)
