"""Other people's programs that can use the models, each in a file that imports that program."""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """What the entry point `lmms_eval.models` tells lmms-eval: where its backend is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = "eagle_moe.integrations.lmms_eval.EagleMixBackend"
    return ModelManifest(model_id="eagle_moe", chat_class_path=path)
