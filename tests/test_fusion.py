from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2.functional import resize

from eagle_moe.fusion import FUSIONS
from eagle_moe.fusion.base import GridOptions, to_grid

CHANNELS = {"a": 6, "b": 10}


def maps(batch: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(batch, 6, 3, 3), "b": torch.randn(batch, 10, 9, 9)}


def build(kind: str, **options: object):
    torch.manual_seed(1)
    return FUSIONS[kind](CHANNELS, FUSIONS[kind].Options.parse(options, "fusion"))


@pytest.mark.parametrize("kind", list(FUSIONS))
@pytest.mark.parametrize("norm", ["none", "layernorm"])
def test_every_fusion_keeps_its_promises(kind, norm):
    fusion = build(kind, grid=5, norm=norm)
    tokens = fusion(maps())
    assert tokens.shape == (2, fusion.num_tokens, fusion.out_channels)
    alone = fusion({name: x[1:] for name, x in maps().items()})
    torch.testing.assert_close(tokens[1:], alone)
    inputs = {name: x.requires_grad_() for name, x in maps().items()}
    (fusion(inputs) ** 2).sum().backward()
    for tensor in [*inputs.values(), *fusion.parameters()]:
        assert tensor.grad is not None
        assert tensor.grad.any()


def bilinear_corners(x: torch.Tensor, grid: int) -> torch.Tensor:
    """Bilinear interpolation between corner-aligned cells, written out for one map (C,h,w)."""
    _, height, width = x.shape
    out = torch.zeros(x.shape[0], grid, grid)
    for i in range(grid):
        for j in range(grid):
            y, z = i * (height - 1) / (grid - 1), j * (width - 1) / (grid - 1)
            top, left = min(int(y), height - 2), min(int(z), width - 2)
            dy, dz = y - top, z - left
            block = x[:, top : top + 2, left : left + 2]
            weights = torch.tensor([[(1 - dy) * (1 - dz), (1 - dy) * dz], [dy * (1 - dz), dy * dz]])
            out[:, i, j] = (block * weights).sum((1, 2))
    return out


def test_concat_is_rows_of_the_grid_with_experts_side_by_side():
    tokens = build("channel_concat", grid=5)(maps())
    for batch in range(2):
        columns = [bilinear_corners(x[batch], 5).flatten(1).T for x in maps().values()]
        torch.testing.assert_close(tokens[batch], torch.cat(columns, 1), rtol=1e-4, atol=1e-5)


def test_append_puts_one_expert_after_the_other():
    fusion = build("sequence_append", grid=5, width=7)
    tokens = fusion(maps())
    assert tokens.shape == (2, 50, 7)
    changed = fusion({**maps(), "b": torch.zeros(2, 10, 9, 9)})
    assert torch.equal(changed[:, :25], tokens[:, :25])
    assert not torch.allclose(changed[:, 25:], tokens[:, 25:])
    assert build("sequence_append", grid=5).out_channels == 10


def test_norm_makes_a_quiet_expert_as_loud_as_the_others():
    loud = {**maps(), "b": 100 * maps()["b"]}
    plain = build("channel_concat", grid=3)(loud)
    assert plain[..., 6:].std() > 20 * plain[..., :6].std()
    normed = build("channel_concat", grid=3, norm="layernorm")(loud)
    assert 0.5 < normed[..., 6:].std() / normed[..., :6].std() < 2


def grid_of(size: int, align_corners: bool = True, antialias: bool = False) -> GridOptions:
    return GridOptions(grid=size, align_corners=align_corners, antialias=antialias)


def test_grid_resize():
    x = torch.randn(1, 2, 4, 4)
    assert to_grid(x, grid_of(4)) is x
    low = to_grid(x.bfloat16(), grid_of(3))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, to_grid(x.bfloat16().float(), grid_of(3)).bfloat16())
    unaligned = to_grid(x, grid_of(8, align_corners=False))
    torch.testing.assert_close(unaligned, resize(x, [8, 8], antialias=False))
    assert not torch.allclose(unaligned, to_grid(x, grid_of(8)))


def test_antialias_averages_the_cells_of_a_finer_map():
    x = torch.randn(1, 2, 8, 8)
    averaged = to_grid(x, grid_of(4, align_corners=False, antialias=True))
    torch.testing.assert_close(averaged, resize(x, [4, 4], antialias=True))
    skipped = to_grid(x, grid_of(4, align_corners=False))
    assert averaged.var() < skipped.var()
    with pytest.raises(ValueError, match="antialias: true needs align_corners: false"):
        GridOptions.parse({"antialias": True}, "fusion")
