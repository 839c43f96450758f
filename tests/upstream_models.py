"""Other people's models, small: what our experts and readers of checkpoints are held against."""

from __future__ import annotations

from functools import partial

from timm.models.eva import Eva
from torch import nn

from tests.parity import randomise


def timm_eva() -> Eva:
    """timm's EVA-02, which attends globally everywhere."""
    model = Eva(
        img_size=64,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=4,
        mlp_ratio=64 / 48,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        class_token=False,
        num_classes=0,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
        use_post_norm=False,
    )
    return randomise(model)


def sam_encoder() -> nn.Module:
    """segment-anything's image encoder; its 10 x 10 cells are padded to 12 x 12 by the windows."""
    from segment_anything.modeling import ImageEncoderViT

    return ImageEncoderViT(
        img_size=80,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=4,
        mlp_ratio=2.0,
        out_chans=16,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1,),
    )
