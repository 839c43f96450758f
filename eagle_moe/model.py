"""The model. `EagleMixModel.forward` reads like flow 1: encode, fuse, connect, place, LLM."""

# No postponed annotations here: transformers reads the class of `config` from its annotation.
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from eagle_moe.config import EagleMixConfig, EagleMixVisionConfig
from eagle_moe.connectors import CONNECTORS, Connector
from eagle_moe.experts import VisionExpert, build_expert
from eagle_moe.fusion import FUSIONS
from eagle_moe.loss import LanguageModelHead, label_loss


@dataclass
class EagleMixModelOutput(BaseModelOutputWithPast):
    """`image_hidden_states`: image tokens (num_images * tokens, D) that were placed, or None."""

    image_hidden_states: Tensor | None = None


@dataclass
class EagleMixCausalLMOutput(ModelOutput):
    """`logits` (B, L or `logits_to_keep`, V), unless skipped; `loss` if there are labels."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class EagleMixPreTrainedModel(PreTrainedModel):
    """What transformers must know about every class here."""

    config: EagleMixConfig
    base_model_prefix = "model"
    input_modalities: ClassVar[tuple[str, ...]] = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _restore_buffers(module)


class EagleMixVisionModel(EagleMixPreTrainedModel):
    """All experts and their fusion: canvas (B,3,S,S) uint8 -> fused tokens (B,N,C)."""

    config: EagleMixVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    base_model_prefix = "vision_tower"

    def __init__(self, config: EagleMixVisionConfig) -> None:
        super().__init__(config)
        self.towers = nn.ModuleDict({spec.name: build_expert(spec) for spec in config.expert_specs})
        channels = {name: expert.channels for name, expert in self._experts()}
        assert config.fusion is not None
        self.fusion = FUSIONS[config.fusion["kind"]](channels, config.fusion_options)
        # An expert's init hook must see each of its own submodules, however deep.
        self._owner = {part: expert for _, expert in self._experts() for part in expert.modules()}
        # Whole experts stay on one device; their blocks are what FSDP wraps.
        self._no_split_modules = sorted(
            {type(part).__name__ for _, expert in self._experts() for part in expert.blocks}
            | {type(expert).__name__ for _, expert in self._experts()}
            | {type(self.fusion).__name__}
        )
        self.post_init()

    def _experts(self) -> list[tuple[str, VisionExpert]]:
        return list(self.towers.items())  # type: ignore[arg-type]

    def get_input_embeddings(self) -> None:
        return None

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Canvas (B,3,S,S) uint8 -> feature map (B,C_i,h_i,w_i) per expert, in mixture order."""
        size = self.config.canvas_size
        if tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values: expected canvases (num_images, 3, {size}, {size}), got "
                f"{tuple(pixel_values.shape)}. Make them with this model's own processor."
            )
        return {name: expert(expert.view(pixel_values)) for name, expert in self._experts()}

    def forward(self, pixel_values: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Canvas (B,3,S,S) uint8, or the maps that `encode` made of it -> fused tokens (B,N,C)."""
        maps = self.encode(pixel_values) if isinstance(pixel_values, Tensor) else pixel_values
        return self.fusion({name: _cast_for(self.fusion, x) for name, x in maps.items()})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        expert = self._owner.get(module)
        if expert is not None and expert.init_weights(module):
            _restore_buffers(module)
        elif expert is None and isinstance(module, nn.Linear):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class EagleMixModel(EagleMixPreTrainedModel):
    """Experts, connector and language model, without the language model's head."""

    def __init__(self, config: EagleMixConfig) -> None:
        super().__init__(config)
        vision = EagleMixVisionModel(config.vision_config)
        self.vision_tower = vision
        assert config.connector is not None
        self.multi_modal_projector: Connector = CONNECTORS[config.connector["kind"]](
            vision.fusion.out_channels,
            config.text_config.hidden_size,
            vision.fusion.num_tokens,
            config.connector_options,
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only the connector comes here. The official release draws it by torch's own rule
        # (nn.Linear's default), not by the LLM's.
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | Mapping[str, Tensor],
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Canvases (num_images,3,S,S) uint8, or their maps by expert -> image tokens.

        `.last_hidden_state`: fused tokens (num_images,N,C). `.pooler_output`: a list with the
        image tokens (M,D) of each image. Nothing in between waits for the host.
        """
        fused_tokens = self.vision_tower(pixel_values)
        projector = self.multi_modal_projector
        image_tokens = projector(_cast_for(projector, fused_tokens))
        return BaseModelOutputWithPooling(
            last_hidden_state=fused_tokens, pooler_output=list(image_tokens)
        )

    def get_placeholder_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor
    ) -> Tensor:
        """Where image tokens go: a mask (B,L,1) with as many true rows as `image_features` (T,D).

        Raises `ValueError` with both numbers if they differ.
        """
        if input_ids is None:
            token = torch.full(
                (), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device
            )
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        placeholders, features = mask.sum(), image_features.shape[0]
        torch_compilable_check(
            placeholders == features,
            lambda: (
                f"The prompts hold {int(placeholders)} image placeholder tokens, but the images "
                f"give {features} ({self.config.num_image_tokens} each). Prepare text and images "
                "together with this model's processor, and never truncate after that."
            ),
        )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EagleMixModelOutput:
        """`input_ids` (B,L) with placeholders, `pixel_values` the canvases of the whole batch.

        Canvases are in prompt order. Without them the experts are not run. `mm_encoder_outputs`
        ({"image": what get_image_features returned}) replaces `pixel_values`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image is not None:
            raise ValueError("Give either pixel_values or mm_encoder_outputs.")
        if pixel_values is not None and pixel_values.shape[0] > 0:
            image = self.get_image_features(pixel_values, return_dict=True)

        image_tokens = None
        if image is not None:
            image_tokens = torch.cat(list(image.pooler_output)).to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_tokens)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_tokens)
        elif input_ids is not None and input_ids.shape[1] > 1:  # a prompt, not a decoding step
            self.get_placeholder_mask(input_ids, inputs_embeds, inputs_embeds.new_empty(0, 1))

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return EagleMixModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_tokens,
        )


class EagleMixForConditionalGeneration(EagleMixPreTrainedModel, GenerationMixin):
    """Images and text in, text out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan: ClassVar = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: EagleMixConfig) -> None:
        super().__init__(config)
        text = config.text_config
        _check_plain_head(text)
        self.model = EagleMixModel(config)
        self.lm_head = LanguageModelHead(text.hidden_size, text.vocab_size, bias=False)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        # A generated placeholder would ask for an image that is not there.
        self.generation_config.suppress_tokens = [config.image_token_id]
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See `EagleMixModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EagleMixCausalLMOutput:
        """As `EagleMixModel.forward`, then logits, and the loss over `labels` (B,L; -100 = ignore).

        `logits_to_keep`: only the last so many positions (0 = all), or the positions of a 1-D
        tensor. `skip_logits`: the same loss, without the memory of logits where there is no label;
        none are returned.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits: without logits and without labels nothing is asked for.")
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = loss = None
        if skip_logits:
            assert labels is not None
            count = kwargs.get("num_items_in_batch")
            loss = label_loss(self.lm_head, outputs[0], labels, count)
        else:
            last = isinstance(logits_to_keep, int)
            keep = slice(-logits_to_keep, None) if last else logits_to_keep
            logits = self.lm_head(outputs[0][:, keep, :])
            if labels is not None:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.text_config.vocab_size,
                    **kwargs,
                )
        return EagleMixCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


def _check_plain_head(text_config: PreTrainedConfig) -> None:
    """Refuse language models whose logits are more than `lm_head(hidden)`."""
    for field in (
        "final_logit_softcapping",  # Gemma 2
        "logits_soft_cap",  # RecurrentGemma
        "logit_scale",  # Cohere
        "logits_scaling",  # Granite
        "lm_head_multiplier",  # Falcon-H1
    ):
        value = getattr(text_config, field, None)
        if value not in (None, 1):
            raise ValueError(
                f"text_config: {text_config.model_type} changes its logits after the head "
                f"({field}={value}), which eagle_moe does not. Choose another language model."
            )


def _cast_for(module: nn.Module, x: Tensor) -> Tensor:
    """`x` in the dtype of the module's parameters: frozen parts may be kept in a lower one."""
    dtypes = (p.dtype for p in module.parameters() if p.is_floating_point())
    return x.to(next(dtypes, x.dtype))


def _restore_buffers(module: nn.Module) -> None:
    """Recompute timm's non-persistent buffers, which loading leaves as uninitialised memory."""
    restore = getattr(module, "init_non_persistent_buffers", None)
    if restore is not None:
        restore()
