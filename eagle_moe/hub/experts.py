"""A pre-aligned expert of the store as a release of its own, and back into a recipe.

A released expert is the folder that a recipe takes as `init.experts: {sam: FOLDER}`: its weights,
`expert.json` (architecture and view), what happened to the weights, and the recipe that did it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from eagle_moe.checkpoint import (
    COMPLETE,
    EXPERT_SPEC,
    RECIPE,
    WEIGHTS,
    Complete,
    PartRecord,
    read_complete,
    read_provenance,
    weight_files,
    write_checkpoint,
    write_json,
    write_provenance,
)
from eagle_moe.experts import ExpertSpec, build_expert
from eagle_moe.hub.details import DETAILS
from eagle_moe.hub.licences import read_specs
from eagle_moe.hub.records import read_recipe
from eagle_moe.hub.scan import without_local_paths
from eagle_moe.interop.importer import check_target
from eagle_moe.parts import expert_prefix, part_hashes, tensor_hash


def is_expert_folder(folder: str | Path) -> bool:
    """Whether `folder` holds one expert, and not a whole model."""
    folder = Path(folder)
    return (folder / EXPERT_SPEC).is_file() and not (folder / "config.json").is_file()


def prepare_expert(source: str | Path, out: str | Path) -> Path:
    """Make a releasable folder `out` of the aligned expert in `source`, whole or not at all.

    The weights are the same bytes; local paths in the records are shortened to their last names. A
    `card.yaml` comes along. Raises `ValueError` if `source` is no finished expert with its records,
    `out` is taken, or the weights are not those that the records and `expert.json` describe.
    """
    source, out = Path(source), Path(out)
    check_target(out)
    complete = read_complete(source)
    if complete is None or not (source / EXPERT_SPEC).is_file():
        lacks = COMPLETE if complete is None else EXPERT_SPEC
        raise ValueError(
            f"{source}: no {lacks} in it, so it is no aligned expert of a store "
            "(STORE/experts/NAME-KEY). Align it first: `make prealign`, or a search."
        )
    spec = check_expert(source)
    with write_checkpoint(out, _without_paths(complete)) as draft:
        shutil.copyfile(source / WEIGHTS, draft / WEIGHTS)
        write_json(draft / EXPERT_SPEC, spec.dump())
        records = read_provenance(source)
        write_provenance(
            draft,
            {
                part: PartRecord.parse(without_local_paths(record.dump()), part)
                for part, record in records.items()
            },
        )
        recipe = without_local_paths(read_recipe(source))
        (draft / RECIPE).write_text(
            yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        if (source / DETAILS).is_file():
            shutil.copyfile(source / DETAILS, draft / DETAILS)
    return out


def check_expert(folder: Path) -> ExpertSpec:
    """The spec of the expert in `folder`, whose weights were read and found to be as recorded.

    Raises `ValueError` naming the tensors that are missing, too many or of another shape, or that
    the hash is not the recorded one.
    """
    (spec,) = read_specs(folder)
    shapes = check_hashes(folder)
    with torch.device("meta"):
        expert = build_expert(spec)
    prefix = expert_prefix(spec.name)
    expected = {prefix + name: value.shape for name, value in expert.state_dict().items()}
    odd = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
    if odd:
        raise ValueError(
            f"{folder}: the weights are not of the expert in {EXPERT_SPEC}: "
            f"{', '.join(sorted(odd)[:5])}{' ...' if len(odd) > 5 else ''}."
        )
    return spec


def check_hashes(folder: Path) -> dict[str, torch.Size]:
    """Shapes of all tensors in `folder`, after each part was hashed and compared with its record.

    Raises `ValueError` naming the part whose weights are not those that `provenance.json` records.
    """
    hashes: dict[str, str] = {}
    shapes: dict[str, torch.Size] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor: Tensor = file.get_tensor(name)
                hashes[name], shapes[name] = tensor_hash(tensor), tensor.shape
    found, told = part_hashes(hashes), read_provenance(folder)
    _compare(folder, found, {part: record.sha256 for part, record in told.items()})
    return shapes


def _compare(folder: Path, found: Mapping[str, str], told: Mapping[str, str]) -> None:
    for part in {**told, **found}:
        here, recorded = found.get(part, "none"), told.get(part, "none")
        if here != recorded:
            raise ValueError(
                f"{folder}: the weights of {part} ({here[:12]}) are not those of its record "
                f"({recorded[:12]}). The folder is damaged or was changed: get it again."
            )


def _without_paths(complete: Complete) -> Complete:
    data = json.loads(json.dumps(complete.identity))
    return complete.model_copy(update={"identity": without_local_paths(data)})
