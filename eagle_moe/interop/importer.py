"""An official Eagle release becomes a checkpoint of ours: planned whole, then streamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from transformers import GenerationConfig

from eagle_moe.build import ModelSpec, build_config, build_model, build_processor
from eagle_moe.checkpoint import (
    Complete,
    PartRecord,
    write_checkpoint,
    write_json,
    write_provenance,
)
from eagle_moe.config import EagleMixConfig
from eagle_moe.interop.eagle_release import read_release, release_rules, release_spec
from eagle_moe.interop.keymap import Plan, Shape, make_plan
from eagle_moe.interop.shards import Shard, open_shards
from eagle_moe.interop.stream import SHARD_BYTES, Tensors, write_stream, written_tensors
from eagle_moe.interop.tokenizer import load_release_tokenizer, release_template
from eagle_moe.parts import model_tensors, part_hashes, part_of
from eagle_moe.processor import EagleMixProcessor
from eagle_moe.profile import Profile
from eagle_moe.schema import load_yaml

REPORT = "import.json"
"""In the imported checkpoint: what became of every key of the release."""
STAGE = "import"

_ENDS_A_TURN = {"llama3": "<|eot_id|>", "llama3-release": "<|eot_id|>", "yi": "<|im_end|>"}
"""Template -> the token after an answer, where that is not the tokenizer's end token."""


@dataclass(frozen=True)
class Import:
    """A release that was found whole and understood; nothing is written yet.

    `expected`: name -> shape of every tensor of our model.
    """

    source: Path
    spec: ModelSpec
    config: EagleMixConfig
    processor: EagleMixProcessor
    shards: list[Shard]
    plan: Plan
    expected: dict[str, Shape]
    generation: GenerationConfig

    @property
    def tensors(self) -> Tensors:
        return written_tensors(self.shards, self.plan)


def plan_import(source: Path, geometry: Path | None = None, template: str | None = None) -> Import:
    """Read everything about a release but its weights' data, and decide about every key.

    `geometry`: a YAML file with the fields of a `Profile` for sizes other than the published ones.
    `template`: chat template instead of the one that the release was trained with.
    Raises `ValueError` that names the file, the field or the keys that do not fit.
    """
    release, llm = read_release(source)
    sizes = Profile.parse(load_yaml(geometry), str(geometry)) if geometry else Profile()
    tokenizer = load_release_tokenizer(source)
    if release.tokenizer_model_max_length:
        tokenizer.model_max_length = release.tokenizer_model_max_length
    template = template or release_template(tokenizer)
    spec = release_spec(release, llm, source, sizes, template)
    processor = build_processor(spec, tokenizer)
    config = build_config(spec, processor.image_token_id)
    with torch.device("meta"):
        model = build_model(config)
    expected = {name: tuple(value.shape) for name, value in model_tensors(model).items()}
    shards = open_shards(source)
    shapes = {key: shape for shard in shards for key, shape in shard.shapes.items()}
    rules = release_rules(config, llm["vocab_size"])
    plan = make_plan(shapes, rules, expected, _where(source, geometry))
    config.dtype = shards[0].dtypes[next(key for key in shards[0].shapes if key in plan.placed)]
    config.architectures = [type(model).__name__]
    generation = _generation(source, config, processor, spec.template, llm["vocab_size"])
    return Import(source, spec, config, processor, shards, plan, expected, generation)


def _where(source: Path, geometry: Path | None) -> str:
    if geometry is None:
        return f"{source}: does not have the sizes of a published Eagle (other sizes: --geometry)"
    return f"{source}: does not fit the geometry in {geometry}"


def _generation(
    source: Path,
    config: EagleMixConfig,
    processor: EagleMixProcessor,
    template: str,
    vocabulary: int,
) -> GenerationConfig:
    """The release's generation settings, which also end a turn where its template does, and never
    write a token that the release does not have."""
    if (source / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(source)
    else:
        generation = GenerationConfig.from_model_config(config.text_config)
    tokenizer = processor.tokenizer
    ends = generation.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [tokenizer.eos_token_id])
    if end := _ENDS_A_TURN.get(template):
        ends = [*ends, tokenizer.convert_tokens_to_ids(end)]
    generation.eos_token_id = sorted(set(ends))
    generation.pad_token_id = tokenizer.pad_token_id
    added = range(vocabulary, config.text_config.vocab_size)
    generation.suppress_tokens = sorted({processor.image_token_id, *added})
    return generation


def run_import(
    job: Import,
    target: Path,
    limit: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda size: None,
) -> None:
    """Write `target`, complete or not at all.

    `limit`: most bytes per weight file. `advance` is told the bytes of each tensor.
    Raises `ValueError` if `target` is taken or the disk has too little room.
    """
    check_target(target)
    check_room(target, job.tensors.total)
    identity = {"release": job.source.name, "config": _digest(job.source)}
    with write_checkpoint(target, Complete(stage=STAGE, identity=identity)) as draft:
        job.config.save_pretrained(draft)
        job.processor.save_pretrained(draft)
        job.generation.save_pretrained(draft)
        hashes = write_stream(job.shards, job.plan, draft, limit, advance)
        write_provenance(draft, _provenance(job, hashes))
        write_json(draft / REPORT, _report(job))


def check_target(target: Path) -> None:
    """Raises `ValueError` if something is there already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists already. Remove it, or give another folder.")


def check_room(target: Path, needed: int) -> None:
    """Raises `ValueError` if the disk of `target` has fewer bytes free than are needed."""
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{target}: needs {needed / 1e9:.2f} GB, but that disk has {free / 1e9:.2f} GB free. "
            "Free space or give a folder elsewhere. Nothing was written."
        )


def _provenance(job: Import, hashes: dict[str, str]) -> dict[str, PartRecord]:
    sizes: dict[str, int] = {}
    for name, shape in job.expected.items():
        sizes[part_of(name)] = sizes.get(part_of(name), 0) + torch.Size(shape).numel()
    origin = f"official Eagle release {job.source.name}, config.json {_digest(job.source)[:12]}"
    return {
        part: PartRecord(sha256=hash_, parameters=sizes[part], history=[origin])
        for part, hash_ in part_hashes(hashes).items()
    }


def _digest(source: Path) -> str:
    return sha256((source / "config.json").read_bytes()).hexdigest()


def _report(job: Import) -> dict[str, object]:
    return {
        "source": job.source.name,
        "model": job.spec.model_copy(
            update={"language_model": None}  # in config.json; its tokenizer lies in this folder
        ).model_dump(mode="json", exclude={"language_model"}),
        "mapped": {key: name for key, (name, _) in job.plan.placed.items()},
        "ignored": job.plan.ignored,
    }
