"""Whether it pays to keep the maps of frozen experts on disk: their size, the room, the gain.

    python -m train.plan.features RECIPE.yaml [key.sub=value ...] [--stage NAME] [--passes N]
                                  [--images N] [--tflops T] [--disk GB/S --free GB]

With `cache_features` a stage computes every map once and reads it from then on (`train.features`).
That pays where images go through the same experts several times: in several epochs, or in several
mixtures of a search. Experts and disk are measured, here and now; to plan for another machine, or
without the data, `--images` gives the number of images, `--tflops` the speed of a device, `--disk`
and `--free` the speed and the room of a disk.

Exit status: 0 it pays in some stage, 1 it does not, 2 an error that the message explains.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from rich.table import Table

from eagle_moe.build import build_config
from eagle_moe.parts import EXPERTS
from eval.page import show_bytes, show_seconds
from train.plan.disk import Disk, measure_disk
from train.plan.images import Visits, count_visits
from train.plan.maps import counted_seconds, map_shapes, timed_seconds
from train.recipe import load_recipe
from train.stages import StageRun, stage_runs
from train.table import show

WORTH = 1.1
"""Times faster that it must be: what is measured varies by as much."""


@dataclass(frozen=True)
class ExpertMaps:
    """The maps of one expert.

    - `shape`: (C,h,w) of a map, `size`: bytes of it.
    - `seconds`: to compute one.
    - `passes`: how often all images are needed.
    """

    name: str
    shape: tuple[int, int, int]
    size: int
    seconds: float
    passes: float


@dataclass(frozen=True)
class FeaturePlan:
    """What a cache of the maps of `images` distinct images takes, and what it saves.

    It is as if no map were there yet, and as if nothing else went on while maps are read.
    """

    title: str
    images: int
    experts: tuple[ExpertMaps, ...]
    disk: Disk

    @property
    def image_bytes(self) -> int:
        """Of all maps of one image."""
        return sum(expert.size for expert in self.experts)

    @property
    def total_bytes(self) -> int:
        return self.images * self.image_bytes

    @property
    def seconds_without(self) -> float:
        """To compute the maps whenever they are needed."""
        return self.images * sum(each.passes * each.seconds for each in self.experts)

    @property
    def seconds_filling(self) -> float:
        """To compute every map once and write it."""
        computing = self.images * sum(expert.seconds for expert in self.experts)
        return computing + self.total_bytes / self.disk.write

    @property
    def seconds_reading(self) -> float:
        """To read the maps whenever they are needed."""
        return self.images * sum(each.passes * each.size for each in self.experts) / self.disk.read

    @property
    def gain(self) -> float:
        """Times faster with the cache than without it, over all passes together."""
        return self.seconds_without / (self.seconds_filling + self.seconds_reading)

    @property
    def refusal(self) -> str | None:
        """Why there should be no cache, with the figures; None if it pays and fits."""
        if self.total_bytes > self.disk.free:
            return (
                f"does not fit: {self.disk.folder} has {show_bytes(self.disk.free)} free for "
                f"{show_bytes(self.total_bytes)}"
            )
        if self.gain < WORTH:
            return (
                f"does not pay: {self._figures}, which is {self.gain:.2f} x as fast where {WORTH} "
                f"is the least; {self._break_even}"
            )
        return None

    @property
    def told(self) -> str:
        """The plan in one sentence."""
        size = f"{show_bytes(self.image_bytes)} per image, {show_bytes(self.total_bytes)} in all"
        verdict = f"refused, as it {self.refusal}"
        if self.refusal is None:
            verdict = f"maps come {self.gain:.1f} x as fast: {self._figures}"
        return f"{self.title}: feature cache of {self.images:,} images, {size}: {verdict}."

    @property
    def _figures(self) -> str:
        return (
            f"{show_seconds(self.seconds_without)} to compute the maps whenever they are needed, "
            f"{show_seconds(self.seconds_filling)} to compute and write them once and "
            f"{show_seconds(self.seconds_reading)} to read them"
        )

    @property
    def _break_even(self) -> str:
        spared = self.seconds_without - WORTH * self.seconds_reading
        if spared <= 0:
            return "reading is too slow for it to pay after any number of passes"
        return f"it pays from {WORTH * self.seconds_filling / spared:.1f} x as many passes on"


def plan_features(
    run: StageRun,
    *,
    runs: int | Mapping[str, int] = 1,
    passes: float | None = None,
    images: int | None = None,
    tflops: float | None = None,
    disk: Disk | None = None,
) -> FeaturePlan:
    """Plan for a run that leaves all its experts frozen.

    - `runs`: how many runs like this one will need the maps, or how many will need each expert's
      (the mixtures of a search that it is in).
    - `passes`: through all images in each of them; default: by its steps and its data.
    - `images`: distinct ones; default: counted in its data.
    - `tflops`: of the device, to count with; default: the experts are timed.
    - `disk`: default: that of the run's feature store, measured.

    Raises `ValueError` if an expert learns, if the data cannot be kept as maps, or if there is no
    telling the passes; `FileNotFoundError` for data that are not there.
    """
    if learning := learning_experts(run):
        raise ValueError(
            f"stages.{run.name}: {', '.join(learning)} learn there, and their maps with them. A "
            "feature cache is for stages that leave all experts frozen."
        )
    if images is None or passes is None:
        visits = count_visits(run) if images is None else Visits.by_epochs(run, images)
        images, passes = visits.images, visits.passes if passes is None else passes
    config = build_config(run.model_spec, image_token_id=0)
    dtype: torch.dtype = getattr(torch, run.frozen_dtype)
    seconds = timed_seconds(config, dtype) if tflops is None else counted_seconds(config, tflops)
    shapes = map_shapes(config)
    times = dict.fromkeys(shapes, runs) if isinstance(runs, int) else runs
    maps = tuple(
        ExpertMaps(name, shape, prod(shape) * dtype.itemsize, seconds[name], passes * times[name])
        for name, shape in shapes.items()
    )
    disk = disk or measure_disk(run.features, piece=max(each.size for each in maps))
    return FeaturePlan(run.title, images, maps, disk)


def learning_experts(run: StageRun) -> list[str]:
    """The experts' parts that a run trains, wholly or through adapters."""
    return [part for part in (*run.trainable, *run.lora) if part.startswith(f"{EXPERTS}.")]


def plan_table(plan: FeaturePlan) -> Table:
    """The plan expert by expert."""
    table = Table(title=f"{plan.title}: {plan.images:,} images", title_justify="left")
    table.add_column("expert")
    for heading in ("map", "per image", "in all", "ms to compute", "ms to read", "passes"):
        table.add_column(heading, justify="right")
    for each in plan.experts:
        table.add_row(
            each.name,
            " x ".join(map(str, each.shape)),
            show_bytes(each.size),
            show_bytes(each.size * plan.images),
            f"{1000 * each.seconds:.3g}",
            f"{1000 * each.size / plan.disk.read:.3g}",
            f"{each.passes:.3g}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m train.plan.features`."""
    parser = argparse.ArgumentParser(
        prog="python -m train.plan.features",
        description="Size, room and gain of a cache of frozen experts' maps.",
    )
    parser.add_argument("recipe", help="path of the recipe (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--stage", help="default: all that leave every expert frozen")
    parser.add_argument("--passes", type=float, help="through all images, over all runs together")
    parser.add_argument("--images", type=float, help="distinct ones, instead of counting them")
    parser.add_argument("--tflops", type=float, help="of a device, instead of timing the experts")
    parser.add_argument("--disk", type=float, help="GB/s of a disk, instead of measuring this one")
    parser.add_argument("--free", type=float, help="GB of room on it")
    given = parser.parse_args(arguments)
    try:
        plans = _plans(given)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    for plan in plans:
        show(plan_table(plan))
        print(plan.told)
    return 0 if any(plan.refusal is None for plan in plans) else 1


def _plans(given: argparse.Namespace) -> list[FeaturePlan]:
    for name in ("passes", "images", "tflops", "disk", "free"):
        if (value := getattr(given, name)) is not None and not value > 0:
            raise ValueError(f"--{name} {value:g}: give a number above 0.")
    if (given.disk is None) != (given.free is None):
        raise ValueError("--disk and --free describe one disk: give both or neither.")
    recipe = load_recipe(given.recipe, given.overrides)
    names = [given.stage] if given.stage else list(recipe.stages)
    runs = [run for name in names for run in stage_runs(recipe, name)]
    runs = [run for run in runs if given.stage or not learning_experts(run)]
    if not runs:
        raise ValueError(f"{recipe.name}: experts learn in every stage, so no map can be kept.")
    options = {"passes": given.passes, "tflops": given.tflops}
    if given.images is not None:
        options["images"] = int(given.images)
    return [plan_features(run, disk=_disk(given, run), **options) for run in runs]


def _disk(given: argparse.Namespace, run: StageRun) -> Disk | None:
    if given.disk is None:
        return None
    return Disk(run.features, 1e9 * given.disk, 1e9 * given.disk, int(1e9 * given.free))


if __name__ == "__main__":
    sys.exit(main())
