"""What vLLM's and SGLang's transformers backends do to a model when they build and run it.

Written from their sources (vLLM 0.33.0 and SGLang 0.5.23, `models/transformers`), which need a GPU:
parameters on the meta device and buffers on a real one; every linear layer, convolution and norm
replaced by the engine's own; another attention in the language model; weights loaded by name;
the language model run on embeddings. An emulation: it shows what a model must allow, not that the
engines run.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "emulated_engine"


class Replaced(nn.Module):
    """The engine's layer in the place of another: the same result, by a weight of its own layout.

    Whoever reaches for the weight finds where and what it is, but no values: an engine may have
    quantised or sliced it.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that it is no submodule
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, *inputs: Tensor) -> Tensor:
        return functional_call(self._layer[0], dict(self.named_parameters()), inputs)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_parameters", {}):
            parameter = self._parameters[name]
            return SimpleNamespace(dtype=parameter.dtype, device=parameter.device)
        return super().__getattr__(name)


def is_replaced(layer: nn.Module) -> bool:
    kinds = nn.Linear | nn.Conv2d | nn.Conv3d
    name = type(layer).__name__
    return isinstance(layer, kinds) or type(layer) is nn.LayerNorm or name.endswith("RMSNorm")


class OneAttention:
    """The engine's attention of one layer: causal, over a whole prompt, heads side by side."""

    def __init__(self, config: Any) -> None:
        self.heads = config.num_attention_heads
        self.key_heads = config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(L, heads * width) each -> the same."""
        length = len(query)
        q, k, v = (x.view(length, -1, self.width).transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(self.heads // self.key_heads, 0) for x in (k, v))
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = (q @ k.mT * scale).masked_fill(later, -torch.inf).softmax(-1)
        return (weights @ v).transpose(0, 1).reshape(length, -1)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attention_instances: dict[int, OneAttention] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert attention_instances is not None, "keyword arguments do not reach the attention"
    assert attention_mask is None
    length = query.shape[-2]
    q, k, v = (x.transpose(1, 2).reshape(length, -1) for x in (query, key, value))
    assert scaling is not None
    return attention_instances[module.layer_idx].forward(q, k, v, scaling), None


class EmulatedEngine:
    """`model` is the base model of a folder, as an engine has it after loading."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
        self.config = AutoConfig.from_pretrained(folder)
        self.text_config = self.config.get_text_config()
        self.text_config._attn_implementation = ATTENTION
        with init_empty_weights(include_buffers=False):
            self.model = AutoModel.from_config(self.config, dtype=dtype)
        assert {p.device.type for p in self.model.parameters()} == {"meta"}
        assert {b.device.type for b in self.model.buffers()} == {"cpu"}
        self.replaced: list[str] = []
        self._replace(self.model, "")
        self._replace_embeddings()
        self._make_room(dtype)
        self.attention_instances = {
            index: OneAttention(self.text_config)
            for index in range(self.text_config.num_hidden_layers)
        }
        self.head = self._load(load_file(folder / "model.safetensors"))

    def _replace(self, module: nn.Module, prefix: str) -> None:
        for name, child in list(module.named_children()):
            if is_replaced(child):
                setattr(module, name, Replaced(child))
                self.replaced.append(prefix + name)
            else:
                self._replace(child, f"{prefix}{name}.")

    def _replace_embeddings(self) -> None:
        rows = self.text_config.vocab_size, self.text_config.hidden_size
        with torch.device("meta"):
            self.model.set_input_embeddings(nn.Embedding(*rows))

    def _make_room(self, dtype: torch.dtype) -> None:
        """What is not loaded afterwards shows: it is not a number."""
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                room = torch.full(parameter.shape, torch.nan, dtype=dtype, device="cpu")
                module.register_parameter(name, nn.Parameter(room, requires_grad=False))

    def _load(self, weights: dict[str, Tensor]) -> Tensor:
        """Put every weight in its place by name; returns the head's, which the engine keeps."""
        parameters = dict(self.model.named_parameters())
        head = weights.pop("lm_head.weight")
        assert {name.removeprefix("model.") for name in weights} == set(parameters)
        for name, weight in weights.items():
            parameters[name.removeprefix("model.")].data.copy_(weight)
        return head

    def image_features(self, pixel_values: Tensor) -> list[Tensor]:
        """Image tokens of each canvas."""
        output = self.model.get_image_features(pixel_values, return_dict=True)
        return list(output.pooler_output)

    @torch.no_grad()
    def run(self, input_ids: list[int], placeholders: list[bool], pixels: Tensor | None) -> Tensor:
        """Hidden states (L,D) of one prompt, whose embeddings the engine puts together."""
        embeddings = self.model.get_input_embeddings()(torch.tensor(input_ids))
        if pixels is not None:
            embeddings[torch.tensor(placeholders)] = torch.cat(self.image_features(pixels))
        output = self.model(
            input_ids=None,
            inputs_embeds=embeddings[None],
            position_ids=torch.arange(len(input_ids))[None],
            use_cache=False,
            return_dict=False,
            attention_instances=self.attention_instances,
        )
        return output[0][0]
