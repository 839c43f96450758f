"""Keys and values of conversations that were answered last, found again by what was said.

A next question repeats all that was said before it, so the language model need not read that again.
Nobody says which conversation goes on: whatever prompt begins as a kept one did, token by token and
image by image, goes on where that one was left. So an edited history, a conversation begun anew and
two visitors with the same image are all the same case, and what differs is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

PREFIX_MEMORY = 2 << 30
"""Bytes of keys and values that are kept: 4,096 tokens of Vicuna-7B in bfloat16."""
REWINDABLE = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache that hold a token's keys and values, and so can forget the last ones."""


@dataclass(frozen=True)
class Prompt:
    """What the keys and values at each position depend on.

    - `ids`: (L,) tokens, on the host, with placeholders where the images are.
    - `images`: one key per image, in prompt order.
    - `starts`: where each image begins in `ids`.
    """

    ids: Tensor
    images: tuple[bytes, ...]
    starts: tuple[int, ...]

    def common(self, other: Prompt) -> int:
        """How many positions at the beginning are the same in both."""
        length = min(len(self.ids), len(other.ids))
        different = (self.ids[:length] != other.ids[:length]).nonzero()
        same = int(different[0]) if len(different) else length
        for mine, its, start in zip(self.images, other.images, self.starts, strict=False):
            if mine != its:
                return min(same, start)
        return same


@dataclass(frozen=True)
class Kept:
    """A prompt with its answer, and a cache that has read exactly this."""

    prompt: Prompt
    cache: Cache


class PrefixMemory:
    """At most `capacity` bytes of keys and values, on the model's device; the oldest go first."""

    def __init__(self, capacity: int = PREFIX_MEMORY) -> None:
        self.capacity = capacity
        self._kept: list[Kept] = []

    def take(self, prompt: Prompt) -> tuple[Cache, int] | None:
        """The cache that has read most of `prompt`, and how much: at least the half of what it had.

        It is the caller's from now on. None if there is no such cache, or none that can forget
        what follows.
        """
        longest = len(prompt.ids) - 1  # `generate` must read one token to write the next
        found = [(min(kept.prompt.common(prompt), longest), kept) for kept in self._kept]
        same, best = max(found, key=lambda pair: pair[0], default=(0, None))
        # Little of a long conversation is worth less to this one than the whole to its own.
        if best is None or 2 * same < len(best.prompt.ids) or not same:
            return None
        self._kept = [kept for kept in self._kept if kept is not best]
        surplus = len(best.prompt.ids) - same
        try:
            if surplus:
                best.cache.crop(-surplus)
        except (RuntimeError, ValueError):  # a sliding window has let go of what came before
            return None
        return best.cache, same

    def keep(self, prompt: Prompt, cache: Cache) -> None:
        """Keep what `cache` has read: the first tokens of `prompt`, as many as there are in it."""
        length = cache.get_seq_length()
        if not _rewindable(cache) or length > len(prompt.ids) or _bytes(cache) > self.capacity:
            return
        read = Prompt(prompt.ids[:length], prompt.images, prompt.starts)
        self._kept.append(Kept(read, cache))
        while sum(_bytes(kept.cache) for kept in self._kept) > self.capacity:
            self._kept.pop(0)


def new_cache(model: object) -> Cache:
    """The cache that `generate` would make itself."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))  # type: ignore[attr-defined]


def caches_by_default(generation_config: object) -> bool:
    """Whether `generate` would use a plain cache: one beam, no drafts, no cache of another kind."""

    def told(name: str) -> object:
        return getattr(generation_config, name, None)

    return (
        told("use_cache") is not False
        and told("cache_implementation") is None
        and told("prompt_lookup_num_tokens") is None
        and told("prefill_chunk_size") is None
        and told("num_beams") in (None, 1)
    )


def prompt_of(ids: Tensor, images: Sequence[bytes], image_token_id: int, per_image: int) -> Prompt:
    """`ids` (L,) with `per_image` placeholders for each of `images`."""
    ids = ids.cpu()
    starts = (ids == image_token_id).nonzero().squeeze(1)[::per_image]
    assert len(starts) == len(images)
    return Prompt(ids, tuple(images), tuple(starts.tolist()))


def _rewindable(cache: Cache) -> bool:
    return bool(cache.layers) and all(type(layer) in REWINDABLE for layer in cache.layers)


def _bytes(cache: Cache) -> int:
    held = (getattr(layer, name) for layer in cache.layers for name in ("keys", "values"))
    return sum(x.nbytes for x in held if isinstance(x, torch.Tensor))
