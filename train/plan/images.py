"""How many images a training run reads, and how often it goes through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eagle_moe.build import build_processor, load_tokenizer
from train.arguments import training_arguments
from train.data.measure import count_images
from train.features import FeatureDataset
from train.stages import StageRun


@dataclass(frozen=True)
class Visits:
    """`images`: distinct ones that a run may read; `passes`: reads of images / `images`."""

    images: int
    passes: float

    @classmethod
    def by_epochs(cls, run: StageRun, images: int) -> Visits:
        """Without looking at data: every image once in an epoch.

        Raises `ValueError` if the stage gives its length in steps.
        """
        args = training_arguments(run)
        if args.max_steps > 0:
            raise ValueError(
                f"stages.{run.name}: it is {args.max_steps} steps long, which are no passes "
                "through so many images without the data. Give the passes too."
            )
        return cls(images, args.num_train_epochs)


def count_visits(run: StageRun) -> Visits:
    """Count in the run's data sets, which must be files as the feature cache takes them.

    Raises `ValueError` or `FileNotFoundError` that names the data set.
    """
    stage, recipe = run.stage, run.recipe
    processor = build_processor(run.model_spec, load_tokenizer(run.model_spec))
    learned = [
        FeatureDataset(recipe.data[name], processor, stage.max_length) for name in stage.data
    ]
    held_out = stage.eval and FeatureDataset(recipe.data[stage.eval.data], processor, None)
    distinct = {
        image
        for dataset in (*learned, *([held_out] if held_out else []))
        for image in dataset.image_sources()
    }
    if not distinct:
        raise ValueError(f"stages.{run.name}: no image in {', '.join(stage.all_data)}.")
    samples, steps = _samples_and_steps(run, learned)
    reads = samples * _images_per_sample(learned)
    if stage.eval and held_out:
        reads += _images(held_out) * np.ceil(steps / stage.eval.every)
    return Visits(len(distinct), float(reads / len(distinct)))


def _images(dataset: FeatureDataset) -> int:
    """Images in all samples of a data set, each as often as it is shown."""
    numbers = np.array([dataset.record_number(index) for index in range(len(dataset))])
    kept = dataset.spec.images == "keep"
    return int(count_images(dataset.records, numbers)[0][numbers].sum()) if kept else 0


def _images_per_sample(datasets: Sequence[FeatureDataset]) -> float:
    weights = [dataset.spec.weight for dataset in datasets]
    shown = sum(weight * _images(each) for weight, each in zip(weights, datasets, strict=True))
    return shown / _epoch(datasets)


def _epoch(datasets: Sequence[FeatureDataset]) -> float:
    """Samples per epoch."""
    return sum(dataset.spec.weight * len(dataset) for dataset in datasets)


def _samples_and_steps(run: StageRun, datasets: Sequence[FeatureDataset]) -> tuple[float, float]:
    args = training_arguments(run)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if args.max_steps <= 0:
        samples = args.num_train_epochs * _epoch(datasets)
        return samples, samples / per_step
    if run.stage.packing:
        raise ValueError(
            f"stages.{run.name}: {args.max_steps} steps of packed rows are no known number of "
            "samples. Give the passes."
        )
    return args.max_steps * per_step, args.max_steps
