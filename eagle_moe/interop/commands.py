"""What `eagle-moe import` prints."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from eagle_moe.interop.importer import REPORT, Import, check_target, plan_import, run_import
from eagle_moe.parts import split_by_part


def import_command(
    source: Path,
    target: Path,
    geometry: Path | None = None,
    template: str | None = None,
    console: Console | None = None,
) -> int:
    """Import the release `source` as `target`, with a bar and a summary. Returns exit code 0."""
    console = console or Console()
    check_target(target)
    job = plan_import(source, geometry, template)
    console.print(summary(job))
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=job.tensors.total)
        run_import(job, target, advance=lambda size: bar.advance(task, size))
    size = decimal(job.tensors.total)
    console.print(f"{target}: {size} of weights, chat template {job.spec.template}.")
    console.print(f"What became of every key: {target / REPORT}")
    return 0


def summary(job: Import) -> Table:
    """Part by part what fills it, then why keys are left out."""
    table = Table("part", "tensors", "parameters", box=box.SIMPLE)
    for part, names in split_by_part(job.expected).items():
        parameters = sum(torch.Size(job.expected[name]).numel() for name in names)
        table.add_row(part, f"{len(names)}", f"{parameters / 1e6:,.1f} M")
    table.add_section()
    for reason, count in Counter(job.plan.ignored.values()).most_common():
        table.add_row(f"left out: {reason}", f"{count}", "")
    return table
