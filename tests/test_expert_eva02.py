"""EVA-02 against timm's Eva where the two meet (global attention), and windows against crops."""

import torch

from eagle_moe.experts import build_expert, eva02, resolve_expert
from eagle_moe.experts.check import distance
from tests.upstream_models import timm_eva


@torch.no_grad()
def test_global_layers_equal_timm(monkeypatch):
    theirs = timm_eva()
    arch = {"hidden_size": 48, "heads": 4, "mlp_size": 64, "global_layers": [0, 1, 2]}
    ours = build_expert(resolve_expert({"preset": "eva02-tiny", "arch": arch}))
    state = {}
    for key, value in theirs.state_dict().items():
        key = key.replace("blocks.", "layers.").replace("patch_embed.proj", "patch_embed")
        key = key.replace("fc1_g", "w1").replace("fc1_x", "w2").replace("fc2", "w3")
        key = key.replace("mlp.norm", "mlp.ffn_ln").replace("q_bias", "q_proj.bias")
        key = key.replace("v_bias", "v_proj.bias")
        if key.startswith(("layers", "patch_embed", "pos_embed")):
            state[key] = value[0] if key == "pos_embed" else value
    ours.load_state_dict(state)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = theirs.forward_intermediates(pixels, indices=1, intermediates_only=True)[0]
    assert distance(ours.eval()(pixels), expected) < 1e-5
    tables = eva02.rotary_tables
    monkeypatch.setattr(eva02, "rotary_tables", lambda n, d, e, b, dev: tables(n, d, n, b, dev))
    assert distance(ours(pixels), expected) > 1e-2  # a mistake: positions not rescaled


@torch.no_grad()
def test_window_is_attention_on_a_crop():
    expert = build_expert(resolve_expert("eva02-tiny"))
    layer = expert.layers[0]
    x = torch.randn(1, 8, 8, 96)
    tables = expert.rotary(4, x.device)
    whole = layer(x, *tables)
    layer.window = 0
    torch.testing.assert_close(whole[:, 4:, :4], layer(x[:, 4:, :4], *tables))


def test_tables_stay_fp32_in_bf16():
    expert = build_expert(resolve_expert("eva02-tiny")).to(torch.bfloat16)
    cos, sin = expert.rotary(8, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    assert not list(expert.buffers())
