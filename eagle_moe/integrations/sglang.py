"""SGLang runs our models by its transformers backend; it calls `register` in each of its processes.

    python -m sglang.launch_server --model-path runs/demo/model --model-impl transformers

Found by the entry point `sglang.srt.plugins`. Nothing of SGLang is imported here. docs/serving.md
says what SGLang asks of a model, and how that is tested.
"""

from __future__ import annotations

from eagle_moe.auto import register_for_engines as register

__all__ = ["register"]
