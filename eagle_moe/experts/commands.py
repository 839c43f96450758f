"""What `eagle-moe experts list` and `eagle-moe experts check` print."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from eagle_moe.experts.check import Report, check_expert, count_parameters
from eagle_moe.experts.registry import build_expert, presets, resolve_expert


def list_experts() -> list[dict[str, str]]:
    """A row per preset, plug-ins included; no memory is taken for weights."""
    rows = []
    for name in sorted(presets()):
        spec = resolve_expert(name)
        with torch.device("meta"):
            expert = build_expert(spec)
        cells = spec.view.size // expert.stride
        rows.append(
            {
                "expert": name,
                "view": f"{spec.view.size} px",
                "map": f"{expert.channels} x {cells} x {cells}",
                "parameters": f"{count_parameters(expert) / 1e6:.1f} M",
                "licence": spec.card.licence,
                "weights": spec.card.checkpoint or "-",
            }
        )
    return rows


def list_command(console: Console | None = None) -> int:
    """Print `list_experts` as a table. Returns the exit code 0."""
    rows = list_experts()
    others = "and any other encoder by name: timm:<model>, open_clip:<model>[:<tag>]"
    columns = [column for column in rows[0] if column != "weights"]  # `check` names them
    table = Table(*columns, box=box.SIMPLE, caption=others)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    (console or Console()).print(table)
    return 0


def check_command(arguments: Sequence[str], console: Console | None = None) -> int:
    """Check the experts named in `arguments`, with `key=value` overrides among them.

    Without a name, every tiny preset is checked. `canvas=N` sets the canvas (default: twice the
    view, so that the view has something to resize), `batch=N` the batch of the speed test; any
    other key is one of the expert's entry, as in `view.size=64 arch.layers=2`.
    Returns the exit code: 1 if any promise is broken.
    """
    console = console or Console()
    names = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a]
    broken = 0
    for name in names or sorted(n for n in presets() if n.endswith("-tiny")):
        report = check_expert(name, overrides)
        console.print(render(report))
        broken += not report.passed
    return 1 if broken else 0


def render(report: Report) -> Table:
    """The report as a table: facts first, then promises."""
    spec = report.spec
    verdict = "keeps the contract" if report.passed else "breaks the contract"
    title = f"{spec.name} ({spec.kind}) {verdict}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in report.facts.items():
        table.add_row(key, value)
    table.add_section()
    for finding in report.findings:
        mark = "[green]kept[/]" if finding.kept else "[red]BROKEN[/]"
        table.add_row(finding.promise, f"{mark}  {finding.seen}")
    return table
