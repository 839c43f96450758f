"""Imports go one way. The rules are in the tables below; the checker is tested on made-up slips."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

PACKAGES = ["eagle_moe", "eval", "train"]
"""A package imports from those before it."""

LAYERS = [
    {"schema", "stubs"},
    {"registry", "canvas", "parts", "loss", "scores", "heatmap"},
    {"experts", "fusion", "connectors", "checkpoint", "limits"},
    {"config"},
    {"pretrained"},
    {"vision", "quantization"},
    {"model", "image_processor"},
    {"processor", "profile"},
    {"build"},
    {"load"},
    {"interop", "doctor", "answer", "explain", "auto"},
    {"chat"},
    {"integrations", "serving"},
    {"web"},
    {""},
    {"hub"},
    {"cli"},
]
"""Of `eagle_moe`: a module imports from the layers before its own, never from its neighbours.
"" is the package's face, `__init__.py`."""

LIGHT = {
    "PIL",
    "huggingface_hub",
    "jinja2",
    "numpy",
    "packaging",
    "pydantic",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
    "yaml",
}
"""What `eagle_moe` may import when it is imported. Every other library waits until it is used."""

HOSTED = "eagle_moe.integrations."
"""A file in there is imported by the program that it is for, and by nobody else of `eagle_moe`."""

VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}


class Import(NamedTuple):
    module: str
    """Dotted name; for `from a import b` it is `a.b`, which may name a thing inside of `a`."""
    line: int
    at_load: bool
    """Whether importing the file runs it: not inside a function, not for type checkers only."""


def imports_of(source: str) -> Iterator[Import]:
    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(name.name, child.lineno, at_load) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "relative imports hide where a module is; ruff bans them"
                for name in child.names:
                    yield Import(f"{child.module}.{name.name}", child.lineno, at_load)
            else:
                later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, at_load and not later and not types)

    yield from walk(ast.parse(source), True)


def part_of(module: str) -> str:
    """`eagle_moe.experts.sam` -> `experts`; the package's face -> ""."""
    parts = module.split(".")
    known = set().union(*LAYERS)
    return parts[1] if len(parts) > 1 and parts[1] in known else ""


def slips(module: str, source: str) -> list[str]:
    """Every import in `source`, the text of `module`, that goes the wrong way or is too heavy."""
    package = module.split(".")[0]
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    own = part_of(module)
    found = []
    for name, line, at_load in imports_of(source):
        library = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if library in PACKAGES:
            if PACKAGES.index(library) > PACKAGES.index(package):
                found.append(f"{where}: {package} lies below {library}")
            elif library == package == "eagle_moe":
                part = part_of(name)
                if name.startswith(HOSTED) and not module.startswith(HOSTED):
                    found.append(f"{where}: for its own program alone")
                if part != own and level[part] >= level[own]:
                    found.append(f"{where}: not below `{own}`")
        elif module.startswith(HOSTED) or package != "eagle_moe" or not at_load:
            continue
        elif library not in LIGHT | sys.stdlib_module_names:
            found.append(f"{where}: import it where it is used")
    return found


def modules(*packages: str) -> dict[str, Path]:
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@pytest.mark.parametrize("module", modules(*PACKAGES))
def test_imports_go_one_way(module):
    assert not slips(module, modules(*PACKAGES)[module].read_text(encoding="utf-8"))


def test_every_module_has_a_layer():
    parts = {part_of(name) or name for name in modules("eagle_moe")}
    known = set().union(*LAYERS, {"eagle_moe"})
    assert parts <= known, f"give {parts - known} a place in LAYERS"


def test_experts_do_not_know_each_other():
    """A file that registers an expert is imported by `experts/__init__.py` alone."""
    paths = {n: p for n, p in modules("eagle_moe").items() if n.startswith("eagle_moe.experts.")}
    experts = {name for name, path in paths.items() if "\n@register_expert(" in path.read_text()}
    assert "eagle_moe.experts.clip" in experts
    for name, path in paths.items():
        for imported in imports_of(path.read_text(encoding="utf-8")):
            known = {imported.module, imported.module.rpartition(".")[0]} & experts
            assert not known, f"{name}:{imported.line} imports the expert {known}"


def test_no_file_has_a_vague_name():
    vague = [str(path) for path in modules(*PACKAGES, "tests").values() if path.stem in VAGUE]
    assert not vague, "say in the name what the file holds"


@pytest.mark.parametrize(
    ("module", "source", "slip"),
    [
        ("eagle_moe.model", "import train.recipe", "lies below train"),
        ("eagle_moe.cli", "def f():\n    from eval import run", "lies below eval"),
        ("eval.run", "from train.jobs import Job", "lies below train"),
        ("eagle_moe.schema", "from eagle_moe.canvas import ViewSpec", "not below `schema`"),
        ("eagle_moe.experts.sam", "from eagle_moe.fusion import Fusion", "not below `experts`"),
        ("eagle_moe.experts.sam", "from eagle_moe import model", "not below `experts`"),
        ("eagle_moe.config", "from eagle_moe import EagleMixConfig", "not below `config`"),
        ("eagle_moe.experts.sam", "import timm", "where it is used"),
        ("eagle_moe.integrations", "import lmms_eval", "where it is used"),
        ("eagle_moe.cli", "from eagle_moe.integrations.lmms_eval import A", "its own program"),
        ("eagle_moe.model", "try:\n    import flash_attn\nexcept E: pass", "where it is used"),
        ("eagle_moe.model", "class A:\n    from peft import LoraConfig", "where it is used"),
    ],
)
def test_the_checker_sees_a_slip(module, source, slip):
    (found,) = slips(module, source)
    assert slip in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train.run", "from eval import run\nimport eagle_moe\nimport ray"),
        ("eagle_moe.experts.sam", "from eagle_moe.experts.base import VisionExpert"),
        ("eagle_moe.experts.sam", "def build():\n    import timm"),
        ("eagle_moe.integrations.lmms_eval", "import lmms_eval\nfrom eagle_moe import answer"),
        ("eagle_moe.model", "if TYPE_CHECKING:\n    from peft import PeftModel"),
        ("eagle_moe", "from eagle_moe.model import EagleMixModel\nimport torch, json"),
        ("eagle_moe.cli", "import eagle_moe"),
    ],
)
def test_the_checker_lets_the_rest_pass(module, source):
    assert not slips(module, source)
