"""Where the weights of each part come from at the start of a run.

Below everything lies the recipe's `init`; the entries of `init_from` override it part by part.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from eagle_moe.checkpoint import (
    EXPERT_WEIGHTS,
    PROVENANCE,
    WEIGHTS,
    read_complete,
    read_provenance,
    weight_files,
)
from eagle_moe.experts import ExpertSpec, resolve_expert
from eagle_moe.interop.fetch import is_hub_id, named_place
from eagle_moe.interop.originals import Original, find_original
from eagle_moe.interop.projector import projector_file
from eagle_moe.parts import CONNECTOR, EXPERTS, LANGUAGE_MODEL, expert_part, resolve_parts
from train.data.manifest import fingerprint_of
from train.data.source import content_of
from train.engines import world_size
from train.recipe import RANDOM, Source
from train.stages import WITHOUT_EFFECT, StageRun


@dataclass(frozen=True)
class Origin:
    """Where one part's weights come from; `place` is a folder, a file, a Hub id, or `random`.

    `expert`: a folder of an expert of ours. `original`: an expert's weights as its library has
    them, with the `spec` that is to take them. `projector`: what the official stage 1 leaves.
    `promised`: an earlier stage, by its name, that has yet to run.
    """

    kind: Literal[
        "checkpoint", "expert", "original", "projector", "language_model", "random", "promised"
    ]
    place: str
    spec: ExpertSpec | None = None

    def original(self) -> Original:
        assert self.kind == "original" and self.spec is not None
        return find_original(self.spec, self.place)


def find_origins(run: StageRun, promised: Collection[str] = ()) -> dict[str, Origin]:
    """Part -> origin, for every part of the run's model.

    `promised`: stages of the recipe whose checkpoints need not be there yet.
    Raises `ValueError` or `FileNotFoundError` that name the stage, the entry and the remedy.
    """
    origins = _initial(run)
    for source in run.stage.sources:
        if source.checkpoint in promised:
            fanned = run.recipe.stages[source.checkpoint].per_expert
            origin = Origin("promised", source.checkpoint)
            origins |= dict.fromkeys(_wanted(run, source, fanned), origin)
            continue
        for part, folder in _given(run, source).items():
            origins[part] = Origin("checkpoint", str(folder))
    _check_whole(run, origins)
    return {part: origins[part] for part in run.parts}


def check_sources(runs: Sequence[StageRun]) -> None:
    """Raise, before anything is spent, if weights that `runs` start from do not exist.

    What one of them will make for a later one counts as existing.
    """
    promised = {run.name for run in runs}
    opened: set[tuple[str, str]] = set()
    for run in runs:
        find_origins(run, promised)
        _check_originals(_initial(run), opened)


def _check_originals(origins: Mapping[str, Origin], opened: set[tuple[str, str]]) -> None:
    """Hold local files to the experts that they are for; what is on the Hub waits for its turn."""
    for part, origin in origins.items():
        if origin.kind != "original" or not Path(origin.place).exists():
            continue
        if (part, origin.place) not in opened:
            opened.add((part, origin.place))
            origin.original().check()


def _check_whole(run: StageRun, known: Collection[str]) -> None:
    missing = [part for part in run.parts if part not in known]
    if missing:
        part = missing[0]
        key = f"init.{part}" if part.startswith(EXPERTS) else "init.language_model"
        raise ValueError(
            f"stages.{run.name}: nothing says where the weights of {', '.join(missing)} come from. "
            f"Give `{key}`: a folder or file, or `{RANDOM}` to start from nothing."
        )


def _initial(run: StageRun) -> dict[str, Origin]:
    """What the recipe's `init` gives."""
    init, model = run.recipe.init, run.model_spec
    origins = {CONNECTOR: Origin("random", RANDOM)}
    # A projector made for a mixture does not fit a single expert.
    if (place := init.connector) not in (None, RANDOM) and run.expert is None:
        if not Path(place).exists():
            raise FileNotFoundError(f"init.connector: no file or folder {place}.")
        origins[CONNECTOR] = Origin("projector", place)
    if place := init.language_model or model.language_model.checkpoint:
        # A Hub id is "owner/name"; anything else must be there.
        if place != RANDOM and not Path(place).exists() and place.count("/") != 1:
            raise FileNotFoundError(f"init.language_model: no folder {place}, nor is it a Hub id.")
        origins[LANGUAGE_MODEL] = Origin("random" if place == RANDOM else "language_model", place)
    for spec in map(resolve_expert, model.experts):
        if place := init.experts.get(spec.name):
            origins[expert_part(spec.name)] = _expert_origin(spec, place)
    return origins


def _expert_origin(spec: ExpertSpec, place: str) -> Origin:
    if place == RANDOM:
        return Origin("random", RANDOM)
    if (Path(place) / EXPERT_WEIGHTS).is_file() or Path(place).name == EXPERT_WEIGHTS:
        return Origin("expert", place)
    if (Path(place) / PROVENANCE).is_file():
        where = f"init.experts.{spec.name}"
        if expert_part(spec.name) not in (held := read_provenance(_complete(Path(place), where))):
            raise ValueError(f"{where}: {place} holds {', '.join(held)}, and not this expert.")
        return Origin("checkpoint", place)
    place = named_place(spec, place)
    if not Path(place).exists() and not is_hub_id(place):
        raise FileNotFoundError(
            f"init.experts.{spec.name}: no folder or file {place}, nor is it a Hub id."
        )
    return Origin("original", place, spec)


def _given(run: StageRun, source: Source) -> dict[str, Path]:
    """Part -> checkpoint folder that an entry of `init_from` takes it from."""
    where = f"stages.{run.name}: init_from: {source.checkpoint}"
    stages = run.recipe.stages
    base = Path(source.checkpoint)
    if source.checkpoint in stages:
        base = Path(run.recipe.output_dir, source.checkpoint)
        fanned = stages[source.checkpoint].per_expert
    else:
        fanned = not (base / "config.json").exists() and any(
            (base / name / "config.json").exists() for name in run.experts
        )
    wanted = _wanted(run, source, fanned)
    if fanned:
        return {part: _complete(base / part.removeprefix(f"{EXPERTS}."), where) for part in wanted}
    held = read_provenance(_complete(base, where))
    if source.parts is None and run.expert is None and set(held) != set(run.parts):
        raise ValueError(
            f"{where}: {base} holds {', '.join(held)}, but the model has {', '.join(run.parts)}. "
            f"Say what to take of it: `{{checkpoint: {source.checkpoint}, parts: [...]}}`."
        )
    if absent := [part for part in wanted if part not in held]:
        raise ValueError(f"{where}: {base} does not hold {', '.join(absent)}.")
    return dict.fromkeys(wanted, base)


def _wanted(run: StageRun, source: Source, fanned: bool) -> list[str]:
    """Parts that an entry of `init_from` is there for; `fanned`: it has a run for each expert."""
    if source.parts is not None:
        chosen = resolve_parts(source.parts, run.recipe.experts, f"stages.{run.name}: init_from")
        return [part for part in chosen if part in run.parts]
    if fanned:
        return [expert_part(name) for name in run.experts]
    # A connector made for a mixture does not fit a single expert.
    return [part for part in run.parts if run.expert is None or part != CONNECTOR]


def _complete(folder: Path, where: str) -> Path:
    if read_complete(folder) is None:
        state = "is not a complete checkpoint" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{where}: {folder} {state}. "
            "Run the stage that makes it first, or give the folder of another run."
        )
    return folder


def run_identity(run: StageRun, origins: Mapping[str, Origin]) -> dict[str, Any]:
    """What determines the weights that `run` ends in, as a flat mapping.

    Data and foreign weights count by content, checkpoints by the hash of each part's weights.
    """
    weights = {part: weights_digest(part, origin) for part, origin in origins.items()}
    return _flatten({**run_settings(run, world_size()), "weights": weights})


def run_settings(run: StageRun, processes: int) -> dict[str, Any]:
    """All of `run_identity` but the weights that the run starts from.

    `processes`: over which it is spread.
    """
    recipe, stage = run.recipe, run.stage
    told = stage.model_dump(
        mode="json",
        exclude={
            "dtype",
            "frozen_dtype",
            "engine",  # sums are rounded otherwise; resume points are stricter
            "eval",
            "tasks",
            "max_unsupervised",
            "on_nonfinite",  # a run that ended under `stop` has skipped nothing
            "max_nonfinite",
            "spike_factor",
            "checkpointing",
            "save_minutes",
        },
    )
    told["args"] = {k: v for k, v in told["args"].items() if k not in WITHOUT_EFFECT}
    told["init_from"] = None  # what it leads to counts, not what it is called
    data = {
        name: {**recipe.data[name].dump(), "content": content_of(recipe.data[name].path)}
        for name in stage.data
    }
    settings = {
        # how many samples make a step, unless the stage says so itself
        **({} if stage.batch_size else {"processes": processes}),
        "seed": recipe.seed,
        "attn_implementation": recipe.attn_implementation,
        "dtype": run.dtype,
        "frozen_dtype": run.frozen_dtype,
    }
    # resolved, so that a preset that changed under its name is noticed
    specs = [resolve_expert(entry).model_dump(exclude={"card"}) for entry in run.model_spec.experts]
    model = {**run.model_spec.dump(), "experts": specs}
    return {**settings, "model": model, "stage": told, "data": data}


def weights_digest(part: str, origin: Origin) -> str:
    """Hash of the weights of `part`; of what has no files, its name."""
    place = Path(origin.place)
    if origin.kind == "checkpoint":
        return read_provenance(place)[part].sha256
    if origin.kind == "expert":
        return _content(str(place / EXPERT_WEIGHTS if place.is_dir() else place))
    if origin.kind == "original":
        return _contents(origin.original().files)
    if origin.kind == "projector":
        return _content(str(projector_file(place)))
    if origin.kind == "language_model" and place.is_dir():
        return _contents(
            weight_files(place) if _has_safetensors(place) else sorted(place.glob("*.bin"))
        )
    return origin.place


def _contents(files: Iterable[Path]) -> str:
    return hashlib.sha256("".join(_content(str(path)) for path in files).encode()).hexdigest()


def _has_safetensors(folder: Path) -> bool:
    return any(folder.glob(f"{WEIGHTS}*"))


def _content(path: str) -> str:
    """Hash of a file's bytes, read once as long as the file does not change."""
    status = os.stat(path)
    return _content_at(path, status.st_mtime_ns, status.st_size)


@cache
def _content_at(path: str, changed: int, size: int) -> str:
    return fingerprint_of(Path(path))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: value}
