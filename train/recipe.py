"""A recipe: one YAML file that says everything about a run. A stage of it is data, not code.

    recipe = load_recipe("configs/recipes/mini.yaml", ["stages.sft.args.max_steps=10"])

Reading a recipe checks it whole (names of parts, experts, data, stages, training arguments), so
that a typo costs nothing. No weights are touched and nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from eagle_moe.build import ModelSpec
from eagle_moe.config import EagleMixConfig
from eagle_moe.experts import resolve_expert
from eagle_moe.parts import CONNECTOR, EXPERTS, LANGUAGE_MODEL, resolve_parts
from eagle_moe.processor import read_template
from eagle_moe.schema import Schema, apply_overrides, load_yaml, nearest
from train.data import DataSpec
from train.engines import AUTO, check_engine

Dtype = Literal["float32", "bfloat16"]

RANDOM = "random"
"""Said instead of a folder: the part starts from random weights, on purpose."""

SET_BY_THE_RUN = {
    "output_dir": "`output_dir` of the recipe",
    "seed": "`seed` of the recipe",
    "data_seed": "`seed` of the recipe",
    "eval_strategy": "`eval` of the stage",
    "eval_steps": "`eval.every` of the stage",
    "per_device_eval_batch_size": "`eval.batch_size` of the stage",
    "remove_unused_columns": "the trainer: batches with images need all their columns",
    "activation_checkpointing": "`checkpointing` of the stage",
    "activation_checkpointing_kwargs": "`checkpointing` of the stage",
    "gradient_checkpointing": "`checkpointing` of the stage",
    "gradient_checkpointing_kwargs": "`checkpointing` of the stage",
    "deepspeed": "`engine` of the stage",
    "fsdp": "`engine` of the stage",
    "fsdp_config": "`engine` of the stage",
    "logging_nan_inf_filter": "the trainer: a loss that is not finite stops the run",
    "resume_from_checkpoint": "the run: it continues by itself",
    "train_sampling_strategy": "`length_aware` and `packing` of the stage",
    "restore_callback_states_from_checkpoint": "the run: it continues by itself",
    "ignore_data_skip": "the run: it continues with the samples that it has not seen",
    "save_only_model": "the run: a resume point holds all that it takes to continue",
    "enable_jit_checkpoint": "the run: it saves when it is asked to stop",
}
"""Training arguments that a stage cannot give, and what decides them."""


class Lora(Schema):
    """Low-rank adapters on the linear layers of a part (peft). The part itself stays frozen."""

    r: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | None = Field(None, min_length=1)
    """Ends of names of linear layers of the part, such as `q_proj` or `mlp.*`; default: all of
    them but the language model's head."""
    quantize: Literal["nf4"] | None = None
    """Keep the frozen weights below the adapters in 4 bit (QLoRA); of `language_model` only."""
    use_rslora: bool = False
    use_dora: bool = False


class Ema(Schema):
    """An exponential moving average of weights."""

    decay: float = Field(gt=0, lt=1)
    """What an average keeps of itself in each step."""
    memory: Literal["device", "host"] = "device"
    """Where it is kept, 4 bytes for each weight that learns: beside the weights or in the host's
    memory, to which they then go in each step."""


def _ema_of_number(given: Any) -> Any:
    return {"decay": given} if isinstance(given, int | float) else given


class Source(Schema):
    """One entry of `init_from`."""

    checkpoint: str
    """An earlier stage of the recipe, or a checkpoint folder."""
    parts: list[str] | None = None
    """What to take of it; default: all, or all but the connector if it is a `per_expert` stage."""


class Evaluation(Schema):
    """Exact match per skill while training, teacher-forced, on held-out records."""

    data: str
    every: int = Field(gt=0)
    """Steps between evaluations; the last step is always evaluated."""
    batch_size: int = Field(8, gt=0)


class Stage(Schema):
    """One training run from checkpoint to checkpoint; `per_expert`, one run for each expert."""

    data: list[str] = Field(min_length=1)
    """Names of data sets, mixed by their weights."""
    trainable: list[str] = []
    """Parts that learn: `experts`, `experts.<name>`, `connector`, `language_model`."""
    lora: dict[str, Lora] = {}
    """Parts that learn through adapters only."""
    init_from: list[str | Source] | None = None
    """Where weights come from, later entries overriding earlier ones part by part; below all of
    them lies the recipe's `init`. Only the first stage may leave it out."""
    per_expert: bool = False
    """One run per expert, with only this expert and a connector of its own, which is dropped by
    the stages that start from it."""
    lr: dict[str, float] = {}
    """Learning rate by part; what is not listed takes `args.learning_rate`."""
    weight_decay: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Weight decay by part; what is not listed takes `args.weight_decay`."""
    layer_decay: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    """Factor by part on the learning rate for every block further from the part's end."""
    ema: Annotated[Ema, BeforeValidator(_ema_of_number)] | None = None
    """A moving average of the weights that learn, which the stage ends in instead of the weights
    of its last step; a number is its `decay`."""
    checkpointing: list[str] = []
    """Parts whose blocks are computed again in the backward pass instead of kept."""
    muon: bool = False
    """Muon for the matrices between hidden layers, AdamW for the rest, instead of `args.optim`."""
    batch_size: int | None = Field(None, gt=0)
    """Samples (rows under `packing`) per optimizer step over all processes; sets the
    accumulation."""
    template: str | None = None
    """Chat template instead of the model's own."""
    max_length: int = Field(2048, gt=0)
    """Tokens per sample; text beyond it is cut, image tokens never are."""
    packing: bool = False
    """Several samples per row of up to `max_length` tokens; `batch_size` then counts rows."""
    length_aware: bool = False
    """Samples of like length in the same step: less padding, and less waiting for each other."""
    max_unsupervised: float = Field(0.01, ge=0, le=1)
    """Share of samples without a token to learn from above which the run refuses to start."""
    eval: Evaluation | None = None
    save_minutes: float | None = Field(None, gt=0)
    """Minutes after which a resume point is saved, beside every `args.save_steps` steps."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do about a step with a loss or gradient that is not finite; either way its samples
    are written down, and the weights are not touched."""
    max_nonfinite: int = Field(10, ge=1)
    """Steps that may be skipped so; the next one stops the run."""
    spike_factor: float | None = Field(10.0, gt=1)
    """A loss or gradient norm above so many times its running median is written down with the
    samples of the step; null: none is."""
    cache_features: bool = False
    """Compute the experts' maps once per image and keep them on disk; needs frozen experts."""
    dtype: Dtype | None = None
    """As the recipe's, for this stage."""
    frozen_dtype: Dtype | None = None
    """As the recipe's, for this stage."""
    engine: str | None = None
    """As the recipe's, for this stage."""
    args: dict[str, Any] = {}
    """Any field of transformers' `TrainingArguments`."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """`init_from` in its long form."""
        return tuple(
            Source(checkpoint=entry) if isinstance(entry, str) else entry
            for entry in self.init_from or ()
        )


class Init(Schema):
    """Where weights come from before the first stage."""

    connector: str | None = None
    """`mm_projector.bin` of an official alignment, or its folder; default: random weights. A run of
    one expert alone starts from random weights in any case."""
    language_model: str | None = None
    """Folder or Hub id of a causal LM, or `random`; default: the model's own checkpoint."""
    experts: dict[str, str] = {}
    """Expert name -> `random`, a folder of ours (`expert.safetensors`, `expert.json`), or an
    original checkpoint (`eagle_moe.interop.originals`): a path, a Hub id, or `pretrained`."""


class Recipe(Schema):
    """A whole run. `parse_recipe` and `load_recipe` make checked ones."""

    name: str
    output_dir: str
    seed: int = 42
    model: ModelSpec
    init: Init = Init()
    dtype: Dtype = "float32"
    """Of the weights. Mixed precision is something else: `args.bf16` of a stage."""
    frozen_dtype: Dtype | None = None
    """Of the parts that a stage leaves alone, to save memory; default: `dtype`."""
    attn_implementation: str = "sdpa"
    peak_tflops: float | None = Field(None, gt=0)
    """bfloat16 TFLOP/s of one device, of which MFU is a share; default: its data sheet's, if it is
    known (`train.throughput.PEAK_TFLOPS`)."""
    engine: str = AUTO
    """How stages are spread over processes: see `train.engines`."""
    features_dir: str | None = None
    """Where `cache_features` keeps maps, for several recipes to share; default: in `output_dir`."""
    data: dict[str, DataSpec]
    stages: dict[str, Stage] = Field(min_length=1)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the model's experts, in mixture order."""
        return tuple(resolve_expert(entry).name for entry in self.model.experts)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.sub=value` overrides, check it whole.

    `base: FILE` at the top takes what the file does not say from another recipe. `model` may be
    the path of a model file, or a mapping with such a `base` and changes. Mappings are merged key
    by key, `null` removes a key. Files are looked for beside the recipe, in the working directory
    and in the repository.
    Raises `FileNotFoundError` or `ValueError` that name the file, the key and the nearest name.
    """
    path = Path(path)
    return parse_recipe(_read(path), str(path), overrides, path.parent)


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, on top of its `base` if it names one."""
    data = load_yaml(path)
    base = data.pop("base", None)
    if base is None:
        return data
    return _merge(_read(_find(base, f"{path}: `base`", path.parent)), data)


def parse_recipe(
    data: Mapping[str, Any], source: str, overrides: Sequence[str] = (), folder: Path = Path()
) -> Recipe:
    """As `load_recipe`, from a mapping; `folder` is where relative model files are looked for."""
    plain = deepcopy(dict(data))
    _check_override_names(plain, overrides)
    # Which model file is read must be known before keys inside it can be overridden.
    first = [item for item in overrides if item.partition("=")[0] in ("model", "model.base")]
    plain = _expand_model(apply_overrides(_with_base(plain), first), source, folder)
    plain = apply_overrides(plain, [item for item in overrides if item not in first])
    recipe = Recipe.parse(plain, source)
    _check(recipe, source)
    return recipe


def _check_override_names(data: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """`stages.sfft.x=1` must not make a stage `sfft`."""
    for override in overrides:
        section, *rest = override.partition("=")[0].split(".")
        names = data.get(section)
        if section not in ("stages", "data") or len(rest) < 2 or not isinstance(names, Mapping):
            continue
        if rest[0] not in names:
            hint = nearest(rest[0], names)
            raise ValueError(f"override {override!r}: `{section}` has no `{rest[0]}`.{hint}")


def _with_base(data: dict[str, Any]) -> dict[str, Any]:
    if isinstance(data.get("model"), str):
        data["model"] = {"base": data["model"]}
    return data


def _expand_model(data: dict[str, Any], source: str, folder: Path) -> dict[str, Any]:
    model = _with_base(data).get("model")
    if not isinstance(model, dict) or "base" not in model:
        return data
    given = {key: value for key, value in model.items() if key != "base"}
    base = load_yaml(_find(model["base"], f"{source}: `model`", folder))
    return {**data, "model": _merge(base, given)}


def _find(name: str, where: str, folder: Path) -> Path:
    places = [folder, Path(), Path(__file__).parents[1]]
    for place in places:
        if (place / name).is_file():
            return place / name
    looked = ", ".join(str((place / name).resolve()) for place in places)
    raise FileNotFoundError(f"{where}: no file {name} (looked for {looked}).")


def _merge(base: Any, given: Any) -> Any:
    """`given` on top of `base`, by the rules of JSON Merge Patch (RFC 7386)."""
    if not isinstance(given, dict):
        return given
    merged = dict(base) if isinstance(base, dict) else {}
    for key, value in given.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged


def _check(recipe: Recipe, source: str) -> None:
    _check_model(recipe, source)
    experts = recipe.experts
    for name in recipe.init.experts:
        _known(name, experts, f"{source}: init.experts")
    earlier: dict[str, Stage] = {}
    for name, stage in recipe.stages.items():
        where = f"{source}: stages.{name}"
        _check_parts(stage, experts, where)
        _check_sources(stage, earlier, experts, where)
        _check_arguments(stage, where)
        _check_engine(recipe, stage, where)
        frozen = stage.frozen_dtype or recipe.frozen_dtype
        if frozen not in (None, stage.dtype or recipe.dtype) and not stage.args.get("bf16"):
            raise ValueError(f"{where}: frozen_dtype differs from dtype: this needs args.bf16.")
        for data in [*stage.data, *([stage.eval.data] if stage.eval else [])]:
            _known(data, recipe.data, f"{where}: data")
        earlier[name] = stage


def _check_model(recipe: Recipe, source: str) -> None:
    """Experts, fusion, connector and chat templates; the LLM's config may need a download."""
    spec = recipe.model
    vision = {"experts": spec.experts, "fusion": spec.fusion}
    try:
        EagleMixConfig(vision_config=vision, connector=spec.connector)
        for template in {spec.template, *(stage.template for stage in recipe.stages.values())}:
            if template is not None:
                read_template(template)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _known(name: str, names: Collection[str], where: str) -> None:
    if name not in names:
        raise ValueError(f"{where}: no `{name}`.{nearest(name, names)}")


def _check_parts(stage: Stage, experts: Sequence[str], where: str) -> None:
    full = resolve_parts(stage.trainable, experts, f"{where}: trainable")
    adapted = resolve_parts(stage.lora, experts, f"{where}: lora")
    if both := set(full) & set(adapted):
        raise ValueError(f"{where}: {sorted(both)} cannot be both in `trainable` and in `lora`.")
    for name, lora in stage.lora.items():
        if lora.quantize and name != LANGUAGE_MODEL:
            raise ValueError(
                f"{where}: lora.{name}: quantize is for `{LANGUAGE_MODEL}` alone. Leave it out."
            )
    if not full and not adapted:
        raise ValueError(f"{where}: nothing learns. Name parts in `trainable` or `lora`.")
    for field in ("lr", "weight_decay", "layer_decay"):
        named = resolve_parts(getattr(stage, field), experts, f"{where}: {field}")
        if idle := set(named) - set(full) - set(adapted):
            raise ValueError(f"{where}: {field}: {sorted(idle)} would get one, but do not learn.")
    for field in ("layer_decay", "checkpointing"):
        if CONNECTOR in resolve_parts(getattr(stage, field), experts, f"{where}: {field}"):
            raise ValueError(f"{where}: {field}: {CONNECTOR} has no repeated blocks. Leave it out.")
    if stage.cache_features and any(part.startswith(f"{EXPERTS}.") for part in (*full, *adapted)):
        raise ValueError(f"{where}: cache_features needs frozen experts, but some of them learn.")
    if stage.per_expert and "language_model" in (*full, *adapted):
        raise ValueError(
            f"{where}: a `per_expert` stage cannot train `language_model`: "
            "there would be one for each expert, and no way to choose."
        )


def _check_sources(
    stage: Stage, earlier: Mapping[str, Stage], experts: Sequence[str], where: str
) -> None:
    if stage.init_from is None and earlier:
        raise ValueError(
            f"{where}: say where its weights come from: `init_from: [{list(earlier)[-1]}]`, "
            "or `init_from: []` to start from `init` again."
        )
    for source in stage.sources:
        resolve_parts(source.parts or (), experts, f"{where}: init_from.parts")
        # A stage's name has no slash; with one, it is a folder, which is looked for at the start.
        if "/" not in source.checkpoint and not Path(source.checkpoint).exists():
            _known(source.checkpoint, earlier, f"{where}: init_from: no earlier stage or folder")


def _check_engine(recipe: Recipe, stage: Stage, where: str) -> None:
    try:
        check_engine(stage.engine or recipe.engine)
    except ValueError as error:
        raise ValueError(f"{where}: engine: {error}") from None


def _check_arguments(stage: Stage, where: str) -> None:
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in stage.args:
        if name in SET_BY_THE_RUN:
            raise ValueError(f"{where}: args.{name} is set by {SET_BY_THE_RUN[name]}.")
        _known(name, names - set(SET_BY_THE_RUN), f"{where}: args")
    if stage.packing and stage.length_aware:
        raise ValueError(f"{where}: packing brings rows of like work together: drop length_aware.")
    if stage.args.get("label_smoothing_factor"):
        raise ValueError(
            f"{where}: args.label_smoothing_factor: transformers would smooth labels that are not "
            "shifted by one, because it does not know this model. Leave it out."
        )
    if stage.batch_size and "gradient_accumulation_steps" in stage.args:
        raise ValueError(
            f"{where}: give `batch_size` (samples per step) or args.gradient_accumulation_steps, "
            "not both."
        )
