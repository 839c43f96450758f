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
    import transformers as tf

    from eagle_moe.config import EagleMixConfig, EagleMixVisionConfig
    from eagle_moe.image_processor import EagleMixImageProcessor
    from eagle_moe.model import (
        EagleMixForConditionalGeneration,
        EagleMixModel,
        EagleMixVisionModel,
    )
    from eagle_moe.processor import EagleMixProcessor

    tf.AutoConfig.register("eagle_moe", EagleMixConfig, exist_ok=True)
    tf.AutoConfig.register("eagle_moe_vision", EagleMixVisionConfig, exist_ok=True)
    tf.AutoModel.register(EagleMixConfig, EagleMixModel, exist_ok=True)
    tf.AutoModel.register(EagleMixVisionConfig, EagleMixVisionModel, exist_ok=True)
    for auto in (tf.AutoModelForImageTextToText, tf.AutoModelForMultimodalLM):
        auto.register(EagleMixConfig, EagleMixForConditionalGeneration, exist_ok=True)
    backends = {"pil": EagleMixImageProcessor, "torchvision": EagleMixImageProcessor}
    tf.AutoImageProcessor.register(EagleMixConfig, image_processor_classes=backends, exist_ok=True)
    tf.AutoProcessor.register(EagleMixConfig, EagleMixProcessor, exist_ok=True)


# Registration imports torch, which takes seconds. The console script answers `--help` without it
# and registers when a command needs the model.
if Path(sys.argv[0]).stem != "eagle-moe":
    register()
