"""ZeRO: DeepSpeed splits optimizer state and gradients (2), and weights too (3).

What DeepSpeed is told stands in `configs/deepspeed/`, or in a JSON file of the recipe's author.
`auto` takes a stage's own value. What a file says itself must not contradict the stage: DeepSpeed
would follow the file and the log would show the stage. Optimizer and schedule are the stage's:
DeepSpeed's own know no learning rate per part. Clipping has to be in the file: without the field
DeepSpeed clips nothing.

With `bf16`, DeepSpeed turns the whole model to bfloat16 and keeps what learns in float32 beside it;
checkpoints are written from the latter, and what does not learn is read again for them, weights
under adapters too (`train.save`). It would round the constants that a model computes for
itself as well (the frequencies of rotary positions), which is undone here.

Under ZeRO 3, what a process without an image would have to collect is known to DeepSpeed's hooks
alone, down to the last layer of an expert. So it runs the experts on one blank picture, on whose
result nothing depends; it would otherwise wait for the others meanwhile. ZeRO 2 needs no such
thing.

DeepSpeed takes its step within the backward pass, before anything else can look at the gradients.
It looks at their norm itself, and leaves the step out if that is not finite; settings that keep it
from looking are refused, and so are versions that do not look.

A step in which no process has an image counts as a step with a gradient of zero in vision: momentum
and weight decay go on, since DeepSpeed updates all that it holds. Other engines leave vision alone.

The model is loaded whole by each process and split when DeepSpeed takes it over. `zero.Init`, which
splits it while it is built, is not used: it draws the weights of parts that start from random
numbers differently in each process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from eagle_moe.parts import model_tensors
from train.engines.imageless import ImagelessRanks, ZeroGradient, gradient_order
from train.engines.processes import ManyProcesses
from train.engines.rehearsal import rehearse

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"

OLDEST = "0.19.8"
"""The first DeepSpeed that leaves out steps whose gradients are not finite in every stage and
dtype. Before, ZeRO 3 took them in bfloat16 and float32, and ZeRO 2 in float32."""


class Zero(ManyProcesses):
    """DeepSpeed with the settings of a JSON file.

    Raises `ValueError` if the file cannot be read, or if DeepSpeed is missing or too old.
    """

    splits_optimizer = True

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        try:
            self.settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"engine: {path}: cannot be read: {error}") from None
        self.stage = self.settings.get("zero_optimization", {}).get("stage")
        if self.stage not in (1, 2, 3):
            raise ValueError(f"{path}: zero_optimization.stage = {self.stage}: give 1, 2 or 3.")
        self.joins_forward = self.splits_weights = self.stage == 3
        self.can_average = self.stage != 3  # `gather` reads the optimizer's pieces instead
        self._touched: set[int] = set()

    @property
    def identity(self) -> dict[str, Any]:
        # buckets and groups decide how the pieces in a resume point are cut
        return {**super().identity, "settings": self.settings}

    def arguments(self) -> dict[str, Any]:
        _import_deepspeed()
        return {"deepspeed": json.loads(json.dumps(self.settings))}

    def check(self, args: TrainingArguments, dtype: str) -> None:
        _build_models_whole()
        self.keeps_dtype = not args.bf16
        for section in ("optimizer", "scheduler"):
            if section in self.settings:
                raise ValueError(
                    f"{self.path}: {section} ({json.dumps(self.settings[section])}): learning "
                    f"rates and schedule are the stage's (args.learning_rate = "
                    f"{args.learning_rate}). Leave the section out."
                )
        for field in ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"):
            if _value(self.settings, field) is False:
                raise ValueError(
                    f"{self.path}: {field} = false: DeepSpeed would let gradients that are not "
                    "finite reach the weights. Leave the field out."
                )
        if dtype == "bfloat16" and not args.bf16:
            raise ValueError(f"engine: {self.name}: dtype = bfloat16 needs args.bf16 = true.")
        for field, name, value in _shared_values(args):
            given = _value(self.settings, field)
            if given != "auto" and given != value:
                said = "nothing, which DeepSpeed takes for off" if given is None else given
                raise ValueError(
                    f"{self.path}: {field} = {said} contradicts {name} = {value} of the stage. "
                    f'Write "auto" for {field}, or change {name}.'
                )

    def adopt(self, trainer: Trainer) -> None:
        args = trainer.args
        self.order = (
            None if self.stage == 3 else gradient_order(trainer.model, args.device, args.bf16)
        )
        self.constants = computed_constants(trainer.model)

    def ready(self, trainer: Trainer) -> None:
        for (module, name), value in self.constants.items():
            module._buffers[name] = value.to(trainer.args.device)
        _build_models_whole()  # accelerate asked for the opposite
        super().ready(trainer)
        self.engine: Any = trainer.model_wrapped
        self.optimizer: Any = self.engine.optimizer
        for parameter in self.engine.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._touch)

    def _touch(self, parameter: Tensor) -> None:
        self._touched.add(id(parameter))

    def keep_in_step(self, model: nn.Module) -> ImagelessRanks:
        if self.stage == 3:
            with torch.no_grad():
                rehearsal = rehearse(model)
            return BlankPicture(model, self.hosts, join_always=True, rehearsal=rehearsal)
        return ImagelessRanks(model, self.hosts, order=self.order)

    def leave_out(self, model: nn.Module) -> bool:
        return bool(self.optimizer.overflow)

    def end_step(self, model: nn.Module) -> None:
        self._touched.clear()  # DeepSpeed has taken the step in the backward pass already
        self.imageless.saw_image()

    def held(self, model: nn.Module) -> dict[str, Tensor]:
        tensors = model_tensors(model)
        parameters = dict(model.named_parameters())
        return {
            name: getattr(parameters.get(name), "ds_tensor", value)
            for name, value in tensors.items()
        }

    def gather(self, model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        tensors, parameters = model_tensors(model), dict(model.named_parameters())
        whole = {}
        for name in tensors if names is None else names:
            value = tensors[name]
            if name in parameters:
                value = _whole(parameters[name])
            if dist.get_rank() == 0:
                whole[name] = value.detach().cpu()
        return whole

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._touched

    def optimized(self, optimizer: Any) -> set[int]:
        groups = self.optimizer.fp16_groups if self.stage == 3 else self.optimizer.bit16_groups
        return {id(parameter) for group in groups for parameter in group}

    def save_optimizer(self, trainer: Trainer, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)

    def load_optimizer(self, trainer: Trainer, folder: Path) -> None:
        found, _ = self.engine.load_checkpoint(
            str(folder), load_module_strict=False, load_lr_scheduler_states=False
        )
        if found is None:
            raise ValueError(f"{folder}: DeepSpeed finds no state of its own in it.")

    def assign(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Buffers only: DeepSpeed restores parameters from the pieces of its optimizer."""
        parameters = {name for name, _ in model.named_parameters()}
        super().assign(model, {n: v for n, v in tensors.items() if n not in parameters})


class BlankPicture(ImagelessRanks):
    """A process without an image runs the experts on a blank one, and attaches zero of it."""

    def fill_in(self, embeddings: Tensor) -> Tensor:
        model: Any = self.model
        size = model.config.vision_config.canvas_size
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=embeddings.device)
        image = model.model.get_image_features(blank, return_dict=True)
        return ZeroGradient.apply(embeddings, *image.pooler_output)


def computed_constants(model: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Buffers that no checkpoint holds, which a model has computed for itself."""
    return {
        (module, name): module._buffers[name].clone()  # type: ignore[union-attr]
        for module in model.modules()
        for name in module._non_persistent_buffers_set
        if module._buffers[name] is not None
    }


def _whole(parameter: nn.Parameter) -> Tensor:
    """What the optimizer keeps of a parameter that learns, the parameter itself if it is frozen."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        value = safe_get_full_fp32_param(parameter)
        if value is not None:
            return value
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter


def _shared_values(args: TrainingArguments) -> list[tuple[str, str, Any]]:
    """Field of DeepSpeed, name and value of the same thing in a stage."""
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return [
        ("gradient_clipping", "args.max_grad_norm", args.max_grad_norm),
        (
            "train_micro_batch_size_per_gpu",
            "args.per_device_train_batch_size",
            args.per_device_train_batch_size,
        ),
        (
            "gradient_accumulation_steps",
            "args.gradient_accumulation_steps",
            args.gradient_accumulation_steps,
        ),
        ("train_batch_size", "batch_size", samples * args.world_size),
        ("bf16.enabled", "args.bf16", args.bf16),
        ("fp16.enabled", "args.fp16", args.fp16),
    ]


def _value(settings: Mapping[str, Any], field: str) -> Any:
    """A field by its dotted name; what DeepSpeed takes if it is not there."""
    value: Any = settings
    for key in field.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None and field.endswith(".enabled"):
        return False
    return value


def _build_models_whole() -> None:
    """Have transformers build and load models as ever, not under `zero.Init`."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _import_deepspeed() -> None:
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            "engine: DeepSpeed is not installed. Install eagle-moe[deepspeed]."
        ) from error
    if Version(deepspeed.__version__) < Version(OLDEST):
        raise ValueError(
            f"engine: DeepSpeed {deepspeed.__version__} takes steps whose gradients are not finite "
            f"and loses the weights. Install deepspeed>={OLDEST}."
        )
    if not torch.cuda.is_available():
        # Compiled for minutes at the start, to speed up all-reduce between processes on one CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
