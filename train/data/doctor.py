"""Examine conversation files before training on them.

    python -m train.data.doctor train.jsonl test.jsonl --model configs/models/mini.yaml --show 3
    python -m train.data.doctor --recipe configs/recipes/mini.yaml --stage sft --out manifest.json

Checks the schema, opens every picture, counts, measures, finds duplicates and leaks between files,
and shows samples with their supervised tokens marked. Exits with 1 if training would refuse the
data, with 2 if it could not be examined at all.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from eagle_moe.processor import EagleMixProcessor, read_template
from train.data.dataset import DataSpec, choose
from train.data.examine import Examination, examine
from train.data.labels import Encoder
from train.data.manifest import FileReport, Manifest, Overlap
from train.data.report import duplicate_ids, overlaps, refusals, report_on
from train.data.show import show_sample
from train.data.supervision import MAX_UNSUPERVISED

if TYPE_CHECKING:
    from eagle_moe.build import ModelSpec

NAMED = 10
"""Bad samples printed per file; the manifest holds all of them."""


@dataclass(frozen=True)
class Plan:
    """What to examine, and as which stage would read it. Without a processor, no tokens."""

    specs: list[DataSpec]
    processor: EagleMixProcessor | None
    max_length: int | None
    max_unsupervised: float

    def encoder(self, spec: DataSpec) -> Encoder | None:
        """What turns records of `spec` into tokens."""
        if self.processor is None:
            return None
        template = read_template(spec.template) if spec.template is not None else None
        return Encoder(self.processor, self.max_length, template, spec.labels)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        plan = _plan(options)
        founds = _examine_all(plan, options.workers)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        return 2
    tokenised = plan.processor is not None
    reports = [report_on(found, tokenised) for found in founds]
    shared = overlaps(founds)
    refused = False
    for found, report in zip(founds, reports, strict=True):
        _print_report(console, report, duplicate_ids(found))
        _print_samples(console, found, plan.encoder(found.spec), options.show)
        reasons = refusals(found, tokenised, plan.max_unsupervised)
        _print_verdict(console, report, reasons)
        refused |= bool(reasons)
    for overlap in shared:
        _print_overlap(console, overlap)
    if options.out:
        Manifest(files=reports, overlaps=shared).save(options.out)
        console.print(f"manifest: {escape(options.out)}", soft_wrap=True)
    return int(refused)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.data.doctor",
        description="Examine conversation files before training on them.",
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help=".json or .jsonl files; several: compared")
    add("--image-root", help="folder of the pictures (default: that of each file)")
    add("--missing-placeholder", choices=("error", "prepend"), default="error")
    add("--on-bad-image", choices=("fail", "skip"), default="fail")
    add("--model", help="model folder or model file: count and show tokens as it reads them")
    add("--template", help="chat template instead of the model's own")
    add("--max-length", type=int, help="tokens per sample (default: no limit)")
    add("--recipe", help="take files, model, template and limit from a stage of this recipe")
    add("--stage", help="which stage (default: the last)")
    add("--max-unsupervised", type=float, help="share of samples without a token to learn")
    add("--show", type=int, default=0, metavar="N", help="print N samples, marked")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="0: no extra process")
    add("--out", metavar="FILE", help="write the manifest there")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    if options.recipe:
        plan = _plan_of_recipe(options)
    elif options.paths:
        plan = _plan_of_paths(options)
    else:
        raise ValueError("name at least one data file, or a --recipe.")
    if options.show and plan.processor is None:
        raise ValueError("--show marks the tokens a model learns from: give --model.")
    return plan


def _plan_of_paths(options: argparse.Namespace) -> Plan:
    specs = [
        DataSpec(
            path=path,
            image_root=options.image_root,
            missing_placeholder=options.missing_placeholder,
            on_bad_image=options.on_bad_image,
            template=options.template,
        )
        for path in options.paths
    ]
    processor = _load_processor(options.model) if options.model else None
    limit = options.max_unsupervised
    return Plan(specs, processor, options.max_length, MAX_UNSUPERVISED if limit is None else limit)


def _plan_of_recipe(options: argparse.Namespace) -> Plan:
    from train.recipe import load_recipe

    fixed = ("paths", "image_root", "model", "template", "max_length")
    if given := [name.replace("_", "-") for name in fixed if getattr(options, name)]:
        raise ValueError(f"--recipe says what to examine: leave out {', '.join(given)}.")
    recipe = load_recipe(options.recipe)
    name = options.stage or list(recipe.stages)[-1]
    if name not in recipe.stages:
        raise ValueError(f"--stage {name}: the recipe has {', '.join(recipe.stages)}.")
    stage = recipe.stages[name]
    specs = [
        spec.model_copy(update={"template": spec.template or stage.template})
        for spec in (recipe.data[key] for key in dict.fromkeys(stage.all_data))
    ]
    limit = options.max_unsupervised
    return Plan(
        specs,
        _processor_of(recipe.model),
        stage.max_length,
        stage.max_unsupervised if limit is None else limit,
    )


def _load_processor(model: str) -> EagleMixProcessor:
    if Path(model).suffix in (".yaml", ".yml"):
        from eagle_moe.build import load_model_spec

        return _processor_of(load_model_spec(model))
    if not Path(model).is_dir():
        raise ValueError(f"--model {model}: neither a model folder nor a model file (.yaml).")
    return EagleMixProcessor.from_pretrained(model)


def _processor_of(spec: ModelSpec) -> EagleMixProcessor:
    from eagle_moe.build import build_processor, load_tokenizer

    return build_processor(spec, load_tokenizer(spec))


def _examine_all(plan: Plan, workers: int) -> list[Examination]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    founds = []
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        for spec in plan.specs:
            task = progress.add_task(escape(spec.path), total=None)

            def advance(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            founds.append(examine(spec, plan.encoder(spec), workers, advance))
    return founds


def _print_report(console: Console, report: FileReport, repeated: list[str]) -> None:
    counts = report.counts
    heading = f"\n[bold]{escape(report.path)}[/]  {report.records} records"
    console.print(heading, soft_wrap=True)
    for name in ("kinds", "skills"):
        if counts[name]:
            parts = (f"{count} {key}" for key, count in sorted(counts[name].items()))
            console.print(f"  {name}: {escape(', '.join(parts))}")
    console.print(f"  images: {counts['images']}, {counts['distinct_images']} distinct")
    console.print(
        f"  duplicates: {counts['duplicate_samples']} samples, {counts['duplicate_ids']} ids"
        + escape(f" (such as {', '.join(repeated)})" if repeated else "")
    )
    if "cut" in counts:
        console.print(
            f"  longer than the limit: {counts['cut']}; nothing to learn: {counts['unsupervised']}"
        )
    console.print(_spread_table(report))
    for sample in report.bad[:NAMED]:
        console.print(f"  {sample.fault}: {escape(sample.reason)}", style="red", soft_wrap=True)
    if len(report.bad) > NAMED:
        console.print(f"  and {len(report.bad) - NAMED} more; --out FILE lists all of them")


def _spread_table(report: FileReport) -> Table:
    columns = ("min", "median", "mean", "p95", "p99", "max", "total")
    table = Table(box=None, padding=(0, 2))
    table.add_column("per sample")
    for column in columns:
        table.add_column(column, justify="right")
    for name in ("answers", "characters", "tokens", "supervised_tokens", "image_side"):
        if values := report.counts.get(name):
            label = "image side, px" if name == "image_side" else name.replace("_", " ")
            shown = [f"{values[column]:g}" for column in columns]
            table.add_row(label, *(shown if name != "image_side" else [*shown[:-1], ""]))
    return table


def _print_samples(
    console: Console, found: Examination, encoder: Encoder | None, number: int
) -> None:
    """`number` random samples among those that can be encoded."""
    usable = np.flatnonzero(found.tokens > 0)
    if encoder is None or number < 1 or len(usable) == 0:
        return
    for index in usable[choose(len(usable), number)]:
        record = found.records[int(index)]
        if found.spec.images == "drop":
            record = record.without_images()
        console.print()
        console.print(show_sample(record, encoder, console.is_terminal), soft_wrap=True)


def _print_verdict(console: Console, report: FileReport, reasons: list[str]) -> None:
    path = escape(report.path)
    if reasons:
        console.print(
            f"{path}: would be refused: {'; '.join(reasons)}", style="red", soft_wrap=True
        )
        return
    left_out = len({sample.index for sample in report.bad if sample.fault == "image"})
    note = f" (samples left out for their images: {left_out})" if left_out else ""
    console.print(f"{path}: can be trained on{note}", style="green", soft_wrap=True)


def _print_overlap(console: Console, overlap: Overlap) -> None:
    pair = f"{overlap.first} and {overlap.second}"
    if not overlap.images and not overlap.samples:
        console.print(
            f"{escape(pair)} share no picture and no sample.", style="green", soft_wrap=True
        )
        return
    examples = ", ".join(" = ".join(ids) for ids in overlap.examples)
    console.print(
        f"{escape(pair)} share pictures: {overlap.images}, whole samples: {overlap.samples} "
        f"(such as {escape(examples)}). A score on one is no proof for the other.",
        style="yellow",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
