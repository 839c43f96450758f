"""The model. `EagleMixModel.forward` reads like flow 1: encode, fuse, connect, place, LLM."""

# No postponed annotations here: transformers reads the class of `config` from its annotation.
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from eagle_moe.config import EagleMixConfig
from eagle_moe.connectors import CONNECTORS, Connector
from eagle_moe.loss import LanguageModelHead, label_loss
from eagle_moe.pretrained import EagleMixPreTrainedModel, cast_for
from eagle_moe.quantization import SparesVision
from eagle_moe.vision import EagleMixVisionModel

__all__ = [
    "EagleMixCausalLMOutput",
    "EagleMixForConditionalGeneration",
    "EagleMixModel",
    "EagleMixModelOutput",
    "EagleMixPreTrainedModel",
    "EagleMixVisionModel",
]


@dataclass
class EagleMixModelOutput(BaseModelOutputWithPast):
    """`image_hidden_states`: image tokens (num_images * tokens, D) that were placed, or None."""

    image_hidden_states: Tensor | None = None


@dataclass
class EagleMixCausalLMOutput(CausalLMOutputWithPast):
    """`logits` (B, L or `logits_to_keep`, V), unless skipped; `loss` if there are labels."""

    image_hidden_states: Tensor | None = None


class EagleMixModel(SparesVision, EagleMixPreTrainedModel):
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
        image_tokens = self._image_tokens(pixel_values, mm_encoder_outputs)
        if image_tokens is not None:
            image_tokens = image_tokens.to(inputs_embeds)
        inputs_embeds = self._place(image_tokens, input_ids, inputs_embeds)
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
        image_tokens = projector(cast_for(projector, fused_tokens))
        return BaseModelOutputWithPooling(
            last_hidden_state=fused_tokens, pooler_output=list(image_tokens)
        )

    def _image_tokens(
        self,
        pixel_values: Tensor | None,
        mm_encoder_outputs: Mapping[str, BaseModelOutputWithPooling] | None,
    ) -> Tensor | None:
        """Image tokens (T,D) of the whole batch, in prompt order; None without an image."""
        image = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image is not None:
            raise ValueError("Give either pixel_values or mm_encoder_outputs.")
        if pixel_values is not None and pixel_values.shape[0] > 0:
            image = self.get_image_features(pixel_values, return_dict=True)
        return None if image is None else torch.cat(list(image.pooler_output))

    def _place(
        self, image_tokens: Tensor | None, input_ids: Tensor | None, inputs_embeds: Tensor
    ) -> Tensor:
        """`inputs_embeds` (B,L,D) with the image tokens (T,D) where the prompt leaves room."""
        if image_tokens is not None:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_tokens)
            return inputs_embeds.masked_scatter(mask, image_tokens)
        if input_ids is not None and input_ids.shape[1] > 1:  # a prompt, not a decoding step
            self.get_placeholder_mask(input_ids, inputs_embeds, inputs_embeds.new_empty(0, 1))
        return inputs_embeds

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


class EagleMixForConditionalGeneration(SparesVision, EagleMixPreTrainedModel, GenerationMixin):
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
        hidden = outputs.last_hidden_state
        logits = None if skip_logits else self.lm_head(_kept(hidden, logits_to_keep))
        loss = None if labels is None else self._loss(hidden, logits, labels, **kwargs)
        return EagleMixCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _loss(self, hidden: Tensor, logits: Tensor | None, labels: Tensor, **kwargs: Any) -> Tensor:
        """From the logits (B,L,V), or, if they were skipped, from the hidden states (B,L,D)."""
        if logits is None:
            return label_loss(self.lm_head, hidden, labels, kwargs.get("num_items_in_batch"))
        vocabulary = self.config.text_config.vocab_size
        loss: Tensor = self.loss_function(
            logits=logits, labels=labels, vocab_size=vocabulary, **kwargs
        )
        return loss


def _kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions of hidden states (B,L,D) that logits are asked for."""
    last = isinstance(logits_to_keep, int)
    keep = slice(-logits_to_keep, None) if last else logits_to_keep
    return hidden[:, keep, :]


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
