"""What is printed before a run's first step: the table of its parts. And that of all stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from torch import nn

from eagle_moe.checkpoint import read_complete
from eagle_moe.parts import part_of
from train.sources import Origin
from train.stages import StageRun
from train.weights import origin_history


def show_parts(
    run: StageRun, model: nn.Module, origins: Mapping[str, Origin], learning_rate: float
) -> None:
    """Print what is about to learn, at which rates, and where its weights come from.

    `learning_rate`: of the parts for which the stage gives none.
    """
    histories = {part: origin_history(part, origins[part], run.recipe.seed) for part in origins}
    show(parts_table(run, model, run.rates(learning_rate), histories))
    if needless := run.needless_checkpointing:
        print(
            f"{run.title}: checkpointing of {', '.join(needless)} is left out: frozen, and "
            "nothing before it learns, so there are no activations to save"
        )


def parts_table(
    run: StageRun,
    model: nn.Module,
    rates: Mapping[str, float],
    histories: Mapping[str, Sequence[str]],
) -> Table:
    """Part, parameters, how many learn, how, at which rate, and where the weights come from."""
    table = Table(title=f"{run.recipe.name}: {run.title}", title_justify="left")
    table.add_column("part")
    for heading in ("parameters", "trainable", "learning rate"):
        table.add_column(heading, justify="right")
    table.add_column("weights from")
    total = trainable = 0
    for part in run.parts:
        sizes = [
            (parameter.numel(), parameter.requires_grad)
            for name, parameter in model.named_parameters()
            if part_of(name) == part
        ]
        count, learning = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
        total, trainable = total + count, trainable + learning
        rate = (
            f"{rates[part]:g}{' (LoRA)' if part in run.lora else ''}" if part in rates else "frozen"
        )
        table.add_row(
            part, f"{count:,}", f"{learning:,}", rate, " > ".join(histories.get(part, ()))
        )
    table.add_section()
    table.add_row("total", f"{total:,}", f"{trainable:,}", "", "")
    return table


def stages_table(runs: Sequence[StageRun]) -> Table:
    """Every run of a recipe: what learns, on which data, from where, and whether it is done."""
    table = Table(
        title=f"{runs[0].recipe.name} -> {runs[0].recipe.output_dir}", title_justify="left"
    )
    for heading in ("stage", "learns", "data", "starts from", "state"):
        table.add_column(heading)
    for run in runs:
        learns = [*run.trainable, *(f"{part} (LoRA)" for part in run.lora)]
        sources = [source.checkpoint for source in run.stage.sources] or ["init"]
        state = "unfinished" if run.workspace.exists() else "not begun"
        if read_complete(run.folder) is not None:
            state = "finished"
        columns = (learns, run.stage.data, sources)
        table.add_row(run.title, *("\n".join(column) for column in columns), state)
    return table


def show(table: Table) -> None:
    """Print on the terminal, or at a fixed width in a log."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
