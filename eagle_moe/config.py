"""Model configuration. Tokens per image is computed here, once; nobody else computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from eagle_moe.connectors import CONNECTORS
from eagle_moe.experts import ExpertSpec, resolve_expert
from eagle_moe.fusion import FUSIONS
from eagle_moe.stubs import CONFIG_MAP, ByStub, write_stubs


class EagleMixVisionConfig(ByStub, PreTrainedConfig):
    """Experts in mixture order, the canvas they look at, and how their maps are fused.

    Order matters under channel concatenation, so it is part of the model.

    - `canvas_size`: pixels per side of the square canvas.
    - `experts`: entries as `eagle_moe.experts.resolve_expert` takes them; stored resolved.
    - `fusion`: `{"kind": ..., **options}`; stored resolved.
    """

    model_type = "eagle_moe_vision"
    base_config_key = "vision_config"

    canvas_size: int = 1024
    experts: list[dict[str, Any] | str] | None = None
    fusion: dict[str, Any] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        specs = [resolve_expert(entry) for entry in (self.experts or ["clip"])]
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise ValueError(f"experts: names must be unique, got {names}. Give each a `name`.")
        self.experts = [spec.dump() for spec in specs]
        self.fusion = _resolve_kind(self.fusion or {"kind": "channel_concat"}, FUSIONS, "fusion")
        super().__post_init__(**kwargs)

    @property
    def expert_specs(self) -> tuple[ExpertSpec, ...]:
        return tuple(ExpertSpec.model_validate(entry) for entry in self.experts or ())

    @property
    def fusion_options(self) -> Any:
        return _options(self.fusion, FUSIONS, "fusion")

    @property
    def num_tokens(self) -> int:
        """Fused tokens per image."""
        assert self.fusion is not None and self.experts is not None
        fusion = FUSIONS[self.fusion["kind"]]
        return fusion.count_tokens(self.fusion_options, len(self.experts))


class EagleMixConfig(ByStub, PreTrainedConfig):
    """A mixture of vision experts read by a causal language model.

    - `vision_config`: an `EagleMixVisionConfig` or its fields.
    - `text_config`: the config of any `AutoModelForCausalLM`, or its fields with `model_type`.
    - `connector`: `{"kind": ..., **options}`; stored resolved.
    - `image_token_id`: id of the placeholder token `<image>` in the tokenizer.
    - `auto_map`: always `eagle_moe.stubs.CONFIG_MAP`.
    """

    model_type = "eagle_moe"
    sub_configs = {"text_config": AutoConfig, "vision_config": EagleMixVisionConfig}

    vision_config: Any = None
    text_config: Any = None
    connector: dict[str, Any] | None = None
    image_token_id: int = 32000
    tie_word_embeddings: bool = False
    auto_map: dict[str, str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = EagleMixVisionConfig(**_fields(self.vision_config))
        if not isinstance(self.text_config, PreTrainedConfig):
            fields = _fields(self.text_config)
            kind = fields.pop("model_type", "llama")
            if kind not in CONFIG_MAPPING:
                raise ValueError(f'text_config: transformers knows no model_type "{kind}".')
            self.text_config = CONFIG_MAPPING[kind](**fields)
        self.connector = _resolve_kind(self.connector or {"kind": "mlp"}, CONNECTORS, "connector")
        self.auto_map = dict(CONFIG_MAP)  # from the Hub it comes with the repository's name in it
        super().__post_init__(**kwargs)

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        """Write the JSON, and the stubs beside it: `save_pretrained` calls it."""
        super().to_json_file(json_file_path, *args, **kwargs)
        write_stubs(Path(json_file_path).parent)

    @property
    def connector_options(self) -> Any:
        return _options(self.connector, CONNECTORS, "connector")

    @property
    def num_image_tokens(self) -> int:
        """LLM tokens per image: what data, processor, model and export must agree on."""
        assert self.connector is not None
        assert isinstance(self.vision_config, EagleMixVisionConfig)
        connector = CONNECTORS[self.connector["kind"]]
        return connector.count_tokens(self.connector_options, self.vision_config.num_tokens)


def _fields(value: Any) -> dict[str, Any]:
    fields = dict(value or {})
    return {key: item for key, item in fields.items() if key != "transformers_version"}


def _resolve_kind(value: dict[str, Any], registry: Any, field: str) -> dict[str, Any]:
    """Validate `{"kind", **options}` and fill in the defaults, so that a checkpoint keeps them."""
    if "kind" not in value:
        raise ValueError(f"{field}: give `kind` (one of {', '.join(registry)}).")
    return {"kind": value["kind"], **_options(value, registry, field).dump()}


def _options(value: Any, registry: Any, field: str) -> Any:
    options = {key: item for key, item in value.items() if key != "kind"}
    return registry[value["kind"]].Options.parse(options, field)
