"""Vision-language models that look through several vision experts at once.

Importing the package registers its classes with the Auto classes of transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PUBLIC = {
    "EagleMixConfig": "config",
    "EagleMixVisionConfig": "config",
    "EagleMixForConditionalGeneration": "model",
    "EagleMixModel": "model",
    "EagleMixVisionModel": "model",
    "EagleMixImageProcessor": "image_processor",
    "EagleMixProcessor": "processor",
}

try:
    __version__ = version("eagle-moe")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


def register() -> None:
    """Make the Auto classes of transformers know `eagle_moe`. May be called again."""
    from eagle_moe.auto import register_classes

    register_classes()


# Registration imports torch, which takes seconds. The console script answers `--help` without it
# and registers when a command needs the model.
if Path(sys.argv[0]).stem != "eagle-moe":
    register()
