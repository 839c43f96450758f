"""What shapes cannot tell: a checkpoint's own configuration must agree with our architecture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from eagle_moe.experts import VisionExpert

Value = Callable[[Any], Any]
Field = str | tuple[str, Value]


@dataclass(frozen=True)
class TransformersConfig:
    """What a `config.json` of transformers must say.

    - `models`: its `model_type`, one of these.
    - `fields`: our `arch` field -> its field, and what makes our value of its.
    - `fixed`: its field -> the only value that our expert computes.
    """

    models: tuple[str, ...]
    fields: Mapping[str, Field]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def check(self, expert: VisionExpert, folder: Path) -> None:
        """Compare the `config.json` in `folder` with `expert`; `ValueError` if they differ."""
        path, kind = folder / "config.json", expert.spec.kind
        config = self._read(path, kind)
        arch = expert.arch.dump()
        made: dict[str, Any] = {}
        faults: list[str] = []
        for name, entry in self.fields.items():
            theirs, convert = entry if isinstance(entry, tuple) else (entry, _as_it_is)
            value = convert(getattr(config, theirs, None))
            if value != arch[name]:
                made[name] = value
                faults.append(f"arch.{name} is {arch[name]}, not {value} ({theirs})")
        _raise_if(faults, path, expert, made)
        for theirs, only in self.fixed.items():
            if (value := getattr(config, theirs, only)) != only:
                raise ValueError(
                    f"{path}: {theirs} is {value}, but experts of kind `{kind}` compute "
                    f"{only}: these weights do not fit any. Take others."
                )

    def _read(self, path: Path, kind: str) -> Any:
        """The part of the configuration that is about the vision encoder, defaults filled in."""
        from transformers import AutoConfig

        data = read_config(path)
        if data is None:
            raise ValueError(
                f"{path.parent}: no {path.name} beside the weights. It says what shapes cannot "
                "tell (heads, activation): copy the whole folder."
            )
        if (model := data.get("model_type")) not in self.models:
            raise ValueError(
                f"{path}: a model of type {model}, but experts of kind `{kind}` start from "
                f"{' or '.join(self.models)}. Give another folder, or change the kind."
            )
        try:
            config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        except (OSError, ValueError, StrictDataclassError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}. Copy it again.") from None
        return getattr(config, "vision_config", config)


def _as_it_is(value: Any) -> Any:
    return value


def _raise_if(faults: list[str], path: Path, expert: VisionExpert, made: Mapping[str, Any]) -> None:
    if faults:
        name = expert.spec.name
        raise ValueError(
            f"{path}: these weights are of another architecture than the expert `{name}`: "
            f"{'; '.join(faults)}. Write `arch: {_inline(made)}` in the model's entry of this "
            "expert, or take other weights."
        )


def _inline(values: Mapping[str, Any]) -> str:
    """A mapping as it stands in YAML on one line."""
    return f"{{{', '.join(f'{name}: {json.dumps(value)}' for name, value in values.items())}}}"


def read_config(path: Path) -> dict[str, Any] | None:
    """The JSON mapping in `path`, None if there is no such file. Raises `ValueError` naming it."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Copy it again.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds no mapping. Copy it again.")
    return data


CLIP = TransformersConfig(
    ("clip", "clip_vision_model"),
    {
        "image_size": "image_size",
        "patch_size": "patch_size",
        "hidden_size": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp_size": "intermediate_size",
        "activation": "hidden_act",
        "norm_eps": "layer_norm_eps",
    },
)

SAM = TransformersConfig(
    ("sam", "sam_vision_model"),
    {
        "image_size": "image_size",
        "patch_size": "patch_size",
        "hidden_size": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp_size": "mlp_dim",
        "window": "window_size",
        "global_layers": ("global_attn_indexes", list),
        "norm_eps": "layer_norm_eps",
    },
    {"hidden_act": "gelu", "qkv_bias": True, "use_abs_pos": True, "use_rel_pos": True},
)

PIX2STRUCT = TransformersConfig(
    ("pix2struct", "pix2struct_vision_model"),
    {
        "hidden_size": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "head_dim": "d_kv",
        "mlp_size": "d_ff",
        "table_size": "seq_len",
        "norm_eps": "layer_norm_eps",
        # A smaller patch that overlaps could have the same number of pixels.
        "patch_size": ("patch_embed_hidden_size", lambda pixels: round((pixels / 3) ** 0.5)),
        "overlap": ("model_type", lambda _: 0),
    },
    {"dense_act_fn": "gelu_new"},
)

DINOV2 = TransformersConfig(
    ("dinov2", "dinov2_with_registers"),
    {
        "image_size": "image_size",
        "patch_size": "patch_size",
        "hidden_size": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp_ratio": "mlp_ratio",
        "swiglu": "use_swiglu_ffn",
        "registers": ("num_register_tokens", lambda count: count or 0),
        # The two classes resample their position tables differently.
        "antialias": ("model_type", lambda model: model == "dinov2_with_registers"),
        "norm_eps": "layer_norm_eps",
    },
    {"hidden_act": "gelu", "qkv_bias": True},
)


def check_timm_config(expert: VisionExpert, folder: Path) -> None:
    """A timm repository's `config.json`, where there is one, names its architecture."""
    data = read_config(folder / "config.json") or {}
    found = data.get("architecture")
    named = expert.spec.kind.partition(":")[2].partition(".")[0]
    if found is not None and found != named:
        raise ValueError(
            f"{folder / 'config.json'}: weights of {found}, but the expert `{expert.spec.name}` is "
            f"a {named}. Set `kind: timm:{found}`, or take other weights."
        )


def check_open_clip_config(expert: VisionExpert, folder: Path) -> None:
    """An open_clip repository's configuration, where it says so, names the activation."""
    _check_open_clip(expert, folder, {"quick_gelu": lambda model: model.get("quick_gelu")})


def check_open_clip_vit(expert: VisionExpert, folder: Path) -> None:
    """The same for our CLIP, whose architecture has names of its own."""
    names = {True: "quick_gelu", False: "gelu"}
    # open_clip's default is heads of 64 channels.
    _check_open_clip(
        expert,
        folder,
        {
            "activation": lambda model: names.get(model.get("quick_gelu")),
            "heads": lambda model: (
                model["vision_cfg"]["width"] // model["vision_cfg"].get("head_width", 64)
            ),
        },
    )


def _check_open_clip(expert: VisionExpert, folder: Path, fields: Mapping[str, Value]) -> None:
    """`fields`: our `arch` field -> its value by an open_clip `model_cfg`, None if that is mute."""
    path = folder / "open_clip_config.json"
    model = (read_config(path) or {}).get("model_cfg")
    if model is None:
        return
    arch = expert.arch.dump()
    made = {name: value(model) for name, value in fields.items()}
    made = {name: value for name, value in made.items() if value not in (None, arch[name])}
    _raise_if(
        [f"arch.{name} is {arch[name]}, not {made[name]}" for name in made], path, expert, made
    )
