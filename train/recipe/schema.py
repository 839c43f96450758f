"""What a recipe holds: a run, its stages, and all that can be said of a stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from eagle_moe.build import ModelSpec
from eagle_moe.experts import resolve_expert
from eagle_moe.schema import Schema
from train.data import DataSpec
from train.engines import AUTO

Dtype = Literal["float32", "bfloat16"]

RANDOM = "random"
"""Said instead of a folder: the part starts from random weights, on purpose."""


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


class TaskEvaluation(Schema):
    """Tasks of the evaluation harness while training, answered and scored as `eval.run` does it.

    Fields without a word here are options of `eval.run`.
    """

    names: list[str] = Field(min_length=1)
    """`skills`, `paper`, or names of lmms-eval's tasks and groups."""
    every: int = Field(gt=0)
    """Steps between evaluations; the last step is always evaluated."""
    data: str | None = None
    limit: int | None = Field(None, gt=0)
    images: Literal["keep", "drop"] = "keep"
    batch_size: int = Field(16, gt=0)
    max_new_tokens: int | None = Field(None, gt=0)
    device: str | None = None
    """Where questions are answered, beside what is being trained."""
    on_failure: Literal["go_on", "stop"] = "go_on"
    """What becomes of the run when an evaluation fails."""


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
    tasks: TaskEvaluation | None = None
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
    def all_data(self) -> tuple[str, ...]:
        """Names of the data sets that it reads, to learn or to be evaluated."""
        return (*self.data, *([self.eval.data] if self.eval else ()))

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
    """Expert name -> `random`, a folder of ours (`expert.safetensors`, `expert.json`), a checkpoint
    that holds it, or an original checkpoint (`eagle_moe.interop.originals`): a path, a Hub id, or
    `pretrained`."""


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
