"""The experts' own original checkpoints, in the formats of the libraries that they come from.

A format is a row of a table: which keys it is recognised by, what becomes of every key, and what
its configuration must say. Nothing in a file is unpickled but plain tensors; a key that no rule
knows, a tensor of ours that nothing fills, and a wrong shape are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle_moe.experts import ExpertSpec, VisionExpert, build_expert
from eagle_moe.interop import geometry, named, rules
from eagle_moe.interop.fetch import fetch
from eagle_moe.interop.keymap import Plan, Rule, Shape, below, ignored, make_plan
from eagle_moe.interop.rules import Fused
from eagle_moe.interop.shards import OPEN_CLIP_STEMS, STEMS, Shard, open_shards

Rules = Callable[[Any], list[Rule]]


@dataclass(frozen=True)
class Format:
    """How a library stores the weights of an encoder.

    - `title`: what it is called in messages.
    - `mark`: pattern of a key that tells it from the other formats of the same kind.
    - `rules`: expert -> rules for every key.
    - `fused`: tensors that our layers keep apart; they are cut before the rules.
    - `check`: raises `ValueError` if a configuration in the weights' folder contradicts the expert.
    - `convert`: takes (expert, tensors, where) through the library's own loader, before the rules.
    """

    title: str
    mark: str
    rules: Rules
    fused: Fused = field(default_factory=dict)
    check: Callable[[VisionExpert, Path], None] | None = None
    convert: Callable[[VisionExpert, Mapping[str, Tensor], str], dict[str, Tensor]] | None = None


def _within(prefix: str, encoder: Rules, *others: Rule) -> Rules:
    """Rules of an `encoder` (by its `arch`) whose keys lie below `prefix`, and of all `others`."""
    return lambda expert: [*below(encoder(expert.arch), prefix), *others]


def _eva02_detector(expert: VisionExpert) -> list[Rule]:
    inside = r".*backbone\.net\."
    net = rules.eva02(expert.arch)
    return [
        *(replace(rule, pattern=inside + rule.pattern) for rule in net),
        ignored(rf"(?!{inside}).+", "belongs to the detector around the backbone"),
    ]


def _clip_trunk(expert: VisionExpert) -> list[Rule]:
    return [
        *below(rules.convnext(expert.arch), f"{named.VISUAL}trunk."),
        ignored(r"visual\.head\..+", named.PRUNED),
        ignored(r"(?!visual\.).+", named.TEXT_TOWER),
    ]


_COMPARED = ignored(
    r"(text_model\..+|text_projection\.weight|visual_projection\.weight|logit_scale)",
    named.TEXT_TOWER,
)
_PROMPTED = ignored(
    r"(prompt_encoder|mask_decoder|shared_image_embedding)\..+", "turns prompts into masks"
)

FORMATS: dict[str, tuple[Format, ...]] = {
    "clip": (
        Format(
            "a folder of transformers' CLIPModel or CLIPVisionModel",
            r"(vision_model\.)?embeddings\.class_embedding",
            _within("", rules.clip, _COMPARED),
            check=geometry.CLIP.check,
        ),
        Format(
            "a checkpoint of open_clip with a ViT",
            r"visual\.class_embedding",
            _within(
                named.VISUAL, rules.open_clip_vit, ignored(r"(?!visual\.).+", named.TEXT_TOWER)
            ),
            rules.OPEN_CLIP_FUSED,
            geometry.check_open_clip_vit,
        ),
    ),
    "convnext": (
        Format(
            "a checkpoint of timm's ConvNeXt",
            r"stem\.0\.weight",
            _within("", rules.convnext),
        ),
        Format(
            "a checkpoint of open_clip with a ConvNeXt",
            r"visual\.trunk\.stem\.0\.weight",
            _clip_trunk,
        ),
    ),
    "sam": (
        Format(
            "a checkpoint of segment-anything",
            r"image_encoder\.pos_embed",
            _within("image_encoder.", rules.segment_anything, _PROMPTED),
        ),
        Format(
            "a folder of transformers' SamModel or SamVisionModel",
            r"vision_encoder\.pos_embed",
            _within("vision_encoder.", rules.sam, _PROMPTED),
            check=geometry.SAM.check,
        ),
    ),
    "eva02": (
        Format("a detection checkpoint of EVA-02", r".*backbone\.net\.pos_embed", _eva02_detector),
    ),
    "pix2struct": (
        Format(
            "a folder of transformers' Pix2StructForConditionalGeneration",
            r"encoder\.layernorm\.weight",
            _within(
                "encoder.",
                rules.pix2struct,
                ignored(r"decoder\..+", "writes the answer, which our language model does"),
            ),
            check=geometry.PIX2STRUCT.check,
        ),
        Format(
            "a folder of transformers' Pix2StructVisionModel",
            r"layernorm\.weight",
            _within("", rules.pix2struct),
            check=geometry.PIX2STRUCT.check,
        ),
    ),
    "dinov2": (
        Format(
            "a folder of transformers' Dinov2Model or Dinov2WithRegistersModel",
            r"embeddings\.cls_token",
            _within("", rules.dinov2),
            rules.DINOV2_FUSED,
            geometry.DINOV2.check,
        ),
    ),
    "timm:": (
        Format(
            "a checkpoint of timm",
            r".+",
            named.timm_rules,
            check=geometry.check_timm_config,
            convert=named.through_timm,
        ),
    ),
    "open_clip:": (
        Format(
            "a checkpoint of open_clip",
            r"(module\.)?visual\..+",
            named.open_clip_rules,
            check=geometry.check_open_clip_config,
            convert=named.through_open_clip,
        ),
    ),
}
"""Kind of expert, or family of kinds -> formats that its weights come in."""

OWN = Format(
    "an expert's weights in this project's layout", r".+", lambda expert: [Rule(r"(.+)", r"\1")]
)

INNER = ("ema_state", "state_dict_ema", "state_dict", "module", "model")
"""Where a training state keeps its weights, the averaged ones first: EVA-02 (`ema_state`,
`module`, `model`), timm (`state_dict_ema`, `state_dict`), open_clip (`state_dict`)."""


@dataclass(frozen=True)
class Original:
    """Weights that were found and recognised as a format of the expert's kind; not yet read."""

    expert: VisionExpert
    """On the meta device."""
    place: Path
    shards: tuple[Shard, ...]
    format: Format

    @property
    def files(self) -> list[Path]:
        return [shard.path for shard in self.shards]

    @property
    def story(self) -> str:
        """Files and format, for a record of where weights came from."""
        first, *more = (path.name for path in self.files)
        return f"{first}{f' and {len(more)} more' if more else ''} ({self.format.title})"

    def check(self) -> None:
        """Raise `ValueError` if names and shapes already tell that `read` would."""
        if self.format.convert is None:
            self.plan()

    def plan(self) -> Plan:
        """What becomes of every key. Raises `ValueError` if they do not fit the expert.

        Only of formats without `convert`: there the library decides, when it reads the tensors.
        """
        assert self.format.convert is None, "its keys are known only when it is read"
        shapes: dict[str, Shape] = {}
        for shard in self.shards:
            for key, shape in shard.shapes.items():
                parts = self._parts(key)
                cut = (shape[0] // len(parts), *shape[1:]) if shape else shape
                shapes |= dict.fromkeys(parts, cut)
        return self._plan(shapes)

    def read(self) -> dict[str, Tensor]:
        """The state dict of the expert. Raises `ValueError` naming what does not fit.

        Dtypes are the file's; what goes through its library comes as that builds it, in fp32.
        """
        if self.format.convert is None:
            plan, every = self.plan(), self._cut()
        else:
            whole = dict(item for shard in self.shards for item in shard.read())
            converted = self.format.convert(self.expert, whole, str(self.place))
            plan, every = self._plan(_shapes(converted)), iter(converted.items())
        return dict(placed for item in every if (placed := plan.place(*item)))

    def _cut(self) -> Iterator[tuple[str, Tensor]]:
        for shard in self.shards:
            for key, value in shard.read():
                parts = self._parts(key)
                cut = value.chunk(len(parts)) if len(parts) > 1 else [value]
                yield from zip(parts, cut, strict=True)

    def _parts(self, key: str) -> list[str]:
        """What the parts of the tensor `key` are called: `key` alone if it is not fused."""
        for pattern, names in self.format.fused.items():
            if match := re.fullmatch(pattern, key):
                return [match.expand(name) for name in names]
        return [key]

    def _plan(self, shapes: Mapping[str, Shape]) -> Plan:
        where = f"{self.place} ({self.format.title})"
        expected = _shapes(self.expert.state_dict())
        return make_plan(shapes, self.format.rules(self.expert), expected, where)


def find_original(spec: ExpertSpec, place: str | Path) -> Original:
    """Recognise the checkpoint at `place` as one that the expert `spec` can start from.

    `place`: a file, a folder, a Hub id (`owner/name[@revision][: file]`) or `pretrained`, the one
    on the expert's card; see `fetch`. Names and shapes are read, and a configuration is compared.
    Raises `ValueError` that names the file and what to do.
    """
    family, colon, _ = spec.kind.partition(":")
    formats = FORMATS.get(family + colon, ())
    stems = (*OPEN_CLIP_STEMS, *STEMS) if family == "open_clip" else (*STEMS, *OPEN_CLIP_STEMS)
    path = fetch(spec, place, stems)
    shards = tuple(open_shards(path, INNER, stems))
    with torch.device("meta"):
        expert = build_expert(spec)
    form = _recognise(expert, {key for shard in shards for key in shard.shapes}, formats, path)
    if form.check is not None:
        form.check(expert, shards[0].path.parent)
    return Original(expert, path, shards, form)


def load_original(spec: ExpertSpec, place: str | Path) -> dict[str, Tensor]:
    """The state dict of the expert `spec` from an original checkpoint; see `find_original`."""
    return find_original(spec, place).read()


def _recognise(
    expert: VisionExpert, keys: set[str], formats: tuple[Format, ...], path: Path
) -> Format:
    if keys <= set(expert.state_dict()):
        return OWN
    for form in formats:
        if any(re.fullmatch(form.mark, key) for key in keys):
            return form
    spec = expert.spec
    known = "; ".join(form.title for form in (*formats, OWN))
    raise ValueError(
        f"{path}: not what the expert `{spec.name}` (kind `{spec.kind}`) can start from, which is: "
        f"{known}. Its keys look like {', '.join(sorted(keys)[:3])}. Give another file, or read "
        "it as the model of a library: `kind: timm:<model>` or `kind: open_clip:<model>`."
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {key: tuple(value.shape) for key, value in tensors.items()}
