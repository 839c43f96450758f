"""Makes transformers, and the engines that look into it, know our classes."""

from __future__ import annotations

import sys

import transformers as tf

from eagle_moe.config import EagleMixConfig, EagleMixVisionConfig
from eagle_moe.image_processor import EagleMixImageProcessor
from eagle_moe.model import EagleMixForConditionalGeneration, EagleMixModel, EagleMixVisionModel
from eagle_moe.processor import EagleMixProcessor


def register_classes() -> None:
    """Make the Auto classes of transformers know `eagle_moe`. May be called again."""
    tf.AutoConfig.register("eagle_moe", EagleMixConfig, exist_ok=True)
    tf.AutoConfig.register("eagle_moe_vision", EagleMixVisionConfig, exist_ok=True)
    tf.AutoModel.register(EagleMixConfig, EagleMixModel, exist_ok=True)
    tf.AutoModel.register(EagleMixVisionConfig, EagleMixVisionModel, exist_ok=True)
    for auto in (tf.AutoModelForImageTextToText, tf.AutoModelForMultimodalLM):
        auto.register(EagleMixConfig, EagleMixForConditionalGeneration, exist_ok=True)
    backends = {"pil": EagleMixImageProcessor, "torchvision": EagleMixImageProcessor}
    tf.AutoImageProcessor.register(EagleMixConfig, image_processor_classes=backends, exist_ok=True)
    tf.AutoProcessor.register(EagleMixConfig, EagleMixProcessor, exist_ok=True)


def register_for_engines() -> None:
    """What `register_classes` does, and the model's class where serving engines look for it.

    vLLM and SGLang look for `architectures[0]` of a config among the names of the module
    transformers, and else run code from the model's folder (`auto_map`), for which one has to give
    leave. May be called again; it is called in every process of an engine.
    """
    register_classes()
    # not `tf`: transformers puts a lazy module in its own place, and a name may hold the old one
    name = EagleMixForConditionalGeneration.__name__
    setattr(sys.modules["transformers"], name, EagleMixForConditionalGeneration)
