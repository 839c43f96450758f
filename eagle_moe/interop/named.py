"""Weights of `timm:` and `open_clip:` experts, taken in by the library that knows the model.

Its own loader resamples position tables to the view and renames what older files call otherwise;
it is strict about every key. What our pruned body keeps of the model is then chosen by rules.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from eagle_moe.experts import VisionExpert
from eagle_moe.interop.keymap import Rule, ignored

Tensors = dict[str, Tensor]

VISUAL = "visual."
"""What the keys of the image tower begin with in a checkpoint of open_clip."""
TEXT_TOWER = "belongs to the text tower or to the comparison with it"
PRUNED = "comes after the map that is read"


def through_timm(expert: Any, tensors: Mapping[str, Tensor], where: str) -> Tensors:
    """All tensors of timm's whole model for this view, from a checkpoint's."""
    import timm

    cfg = timm.get_pretrained_cfg(expert.spec.kind.partition(":")[2])
    names = cfg.classifier if cfg else None
    heads = [names] if isinstance(names, str) else names or []
    # As many classes as the file has: timm stops being strict when it has to drop a classifier.
    classes = next((len(tensors[key]) for n in heads if (key := f"{n}.weight") in tensors), 0)
    overlay = {"state_dict": dict(tensors), "num_classes": classes, "label_offset": 0}
    try:
        model = expert.whole_model(classes, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError) as error:
        raise _misfit(expert, where, error) from None
    return model.state_dict()


def timm_rules(expert: VisionExpert) -> list[Rule]:
    """Of the keys of timm's whole model."""
    return [_kept_rule(expert, ""), ignored(r".+", PRUNED)]


def through_open_clip(expert: Any, tensors: Mapping[str, Tensor], where: str) -> Tensors:
    """The tensors of a checkpoint, those of the image tower as open_clip has them for this view."""
    from open_clip.model import resize_pos_embed

    found = {key.removeprefix("module."): value for key, value in tensors.items()}
    tower = expert.whole_tower()
    resize_pos_embed(found, SimpleNamespace(visual=tower))
    visual = {k.removeprefix(VISUAL): v for k, v in found.items() if k.startswith(VISUAL)}
    try:
        tower.load_state_dict(visual)
    except RuntimeError as error:
        raise _misfit(expert, where, error) from None
    if expert.from_timm and hasattr(tower.trunk, "set_input_size"):
        tower.trunk.set_input_size(img_size=expert.view_spec.size)
    return {**found, **{f"{VISUAL}{key}": value for key, value in tower.state_dict().items()}}


def open_clip_rules(expert: Any) -> list[Rule]:
    """Of the keys of a whole open_clip model."""
    return [
        _kept_rule(expert, f"{VISUAL}trunk." if expert.from_timm else VISUAL),
        ignored(rf"{re.escape(VISUAL)}.+", PRUNED),
        ignored(r".+", TEXT_TOWER),
    ]


def _kept_rule(expert: VisionExpert, prefix: str) -> Rule:
    """The keys below `prefix` that our body has."""
    kept = [re.escape(key.removeprefix("body.")) for key in expert.state_dict()]
    return Rule(rf"{re.escape(prefix)}({'|'.join(kept)})", r"body.\1")


def _misfit(expert: VisionExpert, where: str, error: Exception) -> ValueError:
    seen = textwrap.shorten(str(error), 600, placeholder=" ...")
    return ValueError(
        f"{where}: these weights do not fit {expert.spec.kind}: {seen} Give those of this model, "
        "or change the kind or arch.options."
    )
