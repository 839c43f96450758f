"""Token-wise connectors: a linear layer, or the MLP of LLaVA-1.5 and Eagle."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from eagle_moe.connectors.base import CONNECTORS, Connector
from eagle_moe.schema import Schema


class MLPOptions(Schema):
    """`depth`: number of Linear layers (2 in Eagle, `mlp2x_gelu`), GELU (erf) between them."""

    depth: int = Field(2, gt=0)


@CONNECTORS.register("mlp")
class MLPConnector(Connector):
    """Linear C->D, then (GELU, Linear D->D) `depth - 1` times. One image token per fused token."""

    Options: ClassVar[type[Schema]] = MLPOptions

    def __init__(
        self, in_channels: int, hidden_size: int, num_tokens: int, options: MLPOptions
    ) -> None:
        super().__init__(in_channels, hidden_size, num_tokens, options)
        layers: list[nn.Module] = [nn.Linear(in_channels, hidden_size)]
        for _ in range(options.depth - 1):
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
        self.layers = nn.Sequential(*layers)

    @classmethod
    def count_tokens(cls, options: Any, num_tokens: int) -> int:
        return num_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


@CONNECTORS.register("linear")
class LinearConnector(MLPConnector):
    """A single Linear layer (LLaVA-1)."""

    Options = Schema

    def __init__(self, in_channels: int, hidden_size: int, num_tokens: int, options: Any) -> None:
        super().__init__(in_channels, hidden_size, num_tokens, MLPOptions(depth=1))
