"""ConvNeXt against timm's own forward pass."""

import torch
from timm.models.convnext import ConvNeXt

from eagle_moe.experts import build_expert, resolve_expert
from eagle_moe.experts.check import distance
from tests.parity import randomise

DIMS, DEPTHS = (8, 12, 16, 24), (1, 2, 2, 1)


@torch.no_grad()
def test_equals_timm():
    for stride in (32, 8):
        options = {"dims": DIMS, "depths": DEPTHS, "output_stride": stride}
        theirs = randomise(ConvNeXt(**options, norm_eps=1e-5, num_classes=10))
        entry = {"preset": "convnext-tiny", "arch": {**options, "layer_scale": 1e-6}}
        ours = build_expert(resolve_expert(entry)).eval()
        state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("head")}
        ours.load_state_dict(state)
        pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        expected = theirs.forward_features(pixels)
        assert ours(pixels).shape == (2, 24, 64 // stride, 64 // stride)
        assert distance(ours(pixels), expected) < 1e-5
        for block in ours.blocks:  # a mistake: no layer scale
            block.gamma.fill_(1.0)
        assert distance(ours(pixels), expected) > 1e-2
