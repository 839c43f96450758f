"""vLLM runs our models by its transformers backend; it calls `register` in each of its processes.

    vllm serve runs/demo/model --model-impl transformers

Found by the entry point `vllm.general_plugins`. Nothing of vLLM is imported here. docs/serving.md
says what vLLM asks of a model, and how that is tested.
"""

from __future__ import annotations

from eagle_moe.auto import register_for_engines as register

__all__ = ["register"]
