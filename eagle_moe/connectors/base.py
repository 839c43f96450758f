"""The contract of a connector: fused tokens (B,N,C) -> image tokens (B,M,D)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from eagle_moe.registry import Registry
from eagle_moe.schema import Schema

CONNECTORS: Registry[type[Connector]] = Registry("connector")


class Connector(nn.Module):
    """Projects fused tokens to the LLM's width; publishes `num_tokens` (M)."""

    Options: ClassVar[type[Schema]] = Schema

    def __init__(self, in_channels: int, hidden_size: int, num_tokens: int, options: Any) -> None:
        """`in_channels` C, `hidden_size` D, `num_tokens` N of the fused tokens."""
        super().__init__()
        self.options = options
        self.num_tokens = self.count_tokens(options, num_tokens)

    @classmethod
    def count_tokens(cls, options: Any, num_tokens: int) -> int:
        """Image tokens M that come of N fused tokens."""
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError
