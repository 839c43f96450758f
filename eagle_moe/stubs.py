"""Three small files beside saved weights that lead a program without our import to the package.

transformers knows a model of ours once `eagle_moe` has been imported. A program that was not made
for it (a server, somebody's script) can load one with `trust_remote_code=True`: `auto_map` in
config.json and processor_config.json then names a class in a file of the same folder, and that
file imports it from here. No code of ours is copied: what runs is what is installed.

Everything that is saved has them. transformers would add the file that defines a class to what was
loaded that way, in place of the stub, and so break whatever is saved again;
`register_for_auto_class` does nothing in our classes, which keeps it from that.
"""

from __future__ import annotations

from pathlib import Path

INSTALL = "pip install eagle-moe"

CONFIG_MAP = {
    "AutoConfig": "configuration_eagle_moe.EagleMixConfig",
    "AutoModel": "modeling_eagle_moe.EagleMixModel",
    "AutoModelForImageTextToText": "modeling_eagle_moe.EagleMixForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_eagle_moe.EagleMixForConditionalGeneration",
}
PROCESSOR_MAP = {
    "AutoProcessor": "processing_eagle_moe.EagleMixProcessor",
    "AutoImageProcessor": "processing_eagle_moe.EagleMixImageProcessor",
}
"""Auto class -> file and class, as `auto_map` has it."""

_MODULES = {
    "EagleMixConfig": "config",
    "EagleMixModel": "model",
    "EagleMixForConditionalGeneration": "model",
    "EagleMixProcessor": "processor",
    "EagleMixImageProcessor": "image_processor",
}
_HEAD = '''"""Leads transformers to the package eagle-moe, which holds the code of this model."""

# In a `try`, since transformers would otherwise ask for a package by a name of its own making.
try:
'''
_TAIL = f"""except ImportError as error:
    raise ImportError(
        f"This model needs the package eagle-moe: {INSTALL} ({{error}})"
    ) from error
"""


def stub_files() -> dict[str, str]:
    """File name -> content, of every file that `CONFIG_MAP` and `PROCESSOR_MAP` name."""
    classes: dict[str, list[str]] = {}
    for reference in {**CONFIG_MAP, **PROCESSOR_MAP}.values():
        file, name = reference.split(".")
        if name not in classes.setdefault(f"{file}.py", []):
            classes[f"{file}.py"].append(name)
    return {file: _stub(names) for file, names in classes.items()}


def write_stubs(folder: str | Path) -> None:
    """Write the files into `folder`."""
    for file, content in stub_files().items():
        (Path(folder) / file).write_text(content, encoding="utf-8")


def _stub(names: list[str]) -> str:
    modules: dict[str, list[str]] = {}
    for name in sorted(names):
        modules.setdefault(_MODULES[name], []).append(name)
    lines = [
        f"    from eagle_moe.{module} import {', '.join(found)}  # noqa: F401\n"
        for module, found in sorted(modules.items())
    ]
    return _HEAD + "".join(lines) + _TAIL


class ByStub:
    """Mixed into a class that a stub leads to."""

    @classmethod
    def register_for_auto_class(cls, auto_class: object = None) -> None:
        """Nothing: see the module."""
