from __future__ import annotations

import pytest
import torch
from torch import nn

from eagle_moe.connectors import CONNECTORS


def build(kind: str, **options: object):
    return CONNECTORS[kind](12, 8, 5, CONNECTORS[kind].Options.parse(options, "connector"))


@pytest.mark.parametrize("kind", list(CONNECTORS))
def test_every_connector_keeps_its_promises(kind):
    connector = build(kind)
    tokens = torch.randn(2, 5, 12)
    output = connector(tokens)
    assert output.shape == (2, connector.num_tokens, 8)
    torch.testing.assert_close(output[1:], connector(tokens[1:]))
    (output**2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in connector.parameters())


@pytest.mark.parametrize(("kind", "depth"), [("mlp", 1), ("mlp", 2), ("mlp", 3), ("linear", 1)])
def test_layers_with_gelu_between(kind, depth):
    connector = build(kind, **({"depth": depth} if kind == "mlp" else {}))
    linears = [m for m in connector.modules() if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linears] == [12, *[8] * (depth - 1)]
    x = expected = torch.randn(1, 5, 12)
    for i, linear in enumerate(linears):
        expected = linear(nn.functional.gelu(expected) if i else expected)
    torch.testing.assert_close(connector(x), expected)
