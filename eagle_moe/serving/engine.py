"""The parts of `transformers serve` that answer, given our model instead of one that they look up.

`transformers serve` finds models in tables of its own that no package can add to, loads whatever
a request names, and opens any address that a request holds. So its handler of chat completions is
used, which writes OpenAI's replies and streams, and its thread that generates; finding, loading and
opening are ours. It is no public interface: `require_engine` checks that it is the known one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from transformers import BatchFeature, GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.processor import EagleMixProcessor
from eagle_moe.serving.request import ChatRequest

USED = {
    ChatCompletionHandler: ["handle_request"],
    GenerateManager: ["submit", "async_submit", "generate_streaming", "generate_non_streaming"],
    GenerationState: ["get_manager", "use_continuous_batching"],
}
KNOWN = "5.19 and 5.23"
"""The versions of transformers that the tests have run on."""

_seed: ContextVar[int | None] = ContextVar("seed", default=None)


def require_engine() -> None:
    """Raises `ValueError` if the installed transformers serves in another way than is known."""
    for owner, names in USED.items():
        for name in names:
            if not hasattr(owner, name):
                raise ValueError(
                    f"transformers {transformers.__version__}: its server has no "
                    f"{owner.__name__}.{name}. eagle-moe serve is tested with {KNOWN}."
                )


class Engine:
    """Answers chat requests with one model; one answer is written at a time, the others wait.

    `max_new_tokens`: of an answer, unless the request says fewer.
    """

    def __init__(
        self,
        model: EagleMixForConditionalGeneration,
        processor: EagleMixProcessor,
        name: str,
        max_new_tokens: int,
    ) -> None:
        self.name = name
        self.processor = processor
        self.defaults = model.generation_config
        self.max_new_tokens = max_new_tokens
        self._handler = ChatCompletionHandler(
            model_manager=OneModel(model, processor), generation_state=OneQueue()
        )

    async def reply(
        self, request: ChatRequest, messages: list[dict[str, Any]], request_id: str
    ) -> Any:
        """The HTTP response. Raises `ValueError` for what only the model can tell is wrong."""
        _seed.set(request.seed)
        body = {
            "model": self.name,
            "messages": messages,
            "stream": request.stream,
            "generation_config": self._settings(request),
        }
        return await self._handler.handle_request(body, request_id)

    def _settings(self, request: ChatRequest) -> str:
        """The model's own generation config with the request's changes, as JSON."""
        settings = {"max_new_tokens": self.max_new_tokens, **request.settings}
        if settings["max_new_tokens"] > self.max_new_tokens:
            raise ValueError(
                f"max_tokens: {settings['max_new_tokens']}, but this server writes at most "
                f"{self.max_new_tokens} tokens."
            )
        config = GenerationConfig(**{**self.defaults.to_diff_dict(), **settings})
        text: str = config.to_json_string()
        return text


class OneModel:
    """In the place of the engine's `ModelManager`: there is this model and no other."""

    force_model = None

    def __init__(
        self, model: EagleMixForConditionalGeneration, processor: EagleMixProcessor
    ) -> None:
        self.model = model
        self.processor = processor

    def process_model_name(self, name: str) -> str:
        return name

    def load_model_and_processor(self, name: str, **_: Any) -> tuple[Any, Any]:
        return self.model, self.processor

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        return Modality.VLM


class OneQueue(GenerationState):
    """Every request waits in the same line: `continuous batching` has no images in it."""

    def __init__(self) -> None:
        super().__init__()
        self._manager = Line()

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self._manager


class Line(GenerateManager):
    """The engine's thread that generates, for prompts that leave room for an answer."""

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: BatchFeature,
        gen_config: Any,
        *args: Any,
        **kw: Any,
    ) -> Any:
        _fit(model, inputs, gen_config)
        # the tokenizer, because stop strings look into its vocabulary
        return super().generate_streaming(
            model, processor.tokenizer, inputs, gen_config, *args, **kw
        )

    async def generate_non_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: BatchFeature,
        gen_config: Any,
        *args: Any,
        **kw: Any,
    ) -> Any:
        _fit(model, inputs, gen_config)
        return await super().generate_non_streaming(
            model, processor.tokenizer, inputs, gen_config, *args, **kw
        )

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return super().submit(_seeded(fn), *args, **kwargs)

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return super().async_submit(_seeded(fn), *args, **kwargs)


def _seeded(run: Callable) -> Callable:
    """`run`, with torch seeded when its turn has come: others may draw before."""
    seed = _seed.get()

    def seeded(*args: Any, **kwargs: Any) -> Any:
        if seed is not None:
            torch.manual_seed(seed)
        return run(*args, **kwargs)

    return seeded


def _fit(model: Any, inputs: BatchFeature, gen_config: GenerationConfig) -> None:
    """Shorten the answer to what the model can read after the prompt."""
    limit = getattr(model.config.text_config, "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if limit is None:
        return
    if length >= limit:
        raise ValueError(
            f"messages: {length} tokens, images and text together, but the model reads {limit}. "
            "Leave out earlier turns or images."
        )
    gen_config.max_new_tokens = min(gen_config.max_new_tokens, limit - length)
