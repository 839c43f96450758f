"""What `eagle-moe release` prints: a line per step as it ends, then what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from eagle_moe.hub.release import Outcome, ReleaseSettings, Step, run_release

SHOWN = 8
"""Refusals of a step that are shown; a broken setting brings about many."""


def release_command(settings: ReleaseSettings, console: Console | None = None) -> int:
    """Release, step by step. Returns 0; raises `ValueError` with what to do if it was refused."""
    console = console or Console()

    @contextmanager
    def shown(title: str) -> Iterator[Step]:
        step, begun = Step(title), time.monotonic()
        with console.status(title):
            yield step
        sign = "[red]✗[/]" if step.refusals else "[green]✓[/]"
        seconds = f"{time.monotonic() - begun:.1f} s"
        console.print(f"{sign} {title:<24} {seconds:>8}  {escape(step.finding)}", soft_wrap=True)

    outcome = run_release(settings, shown)
    if outcome.refusals:
        raise ValueError(refused(settings, outcome))
    console.print(escape(told(settings, outcome)), soft_wrap=True)
    return 0


def refused(settings: ReleaseSettings, outcome: Outcome) -> str:
    """Every reason, and what stands."""
    count = len(outcome.refusals)
    state = "must not be pushed"
    if outcome.pushed is not None:
        state = f"was pushed ({outcome.pushed.url}) and does not come back as it was"
    lines = [f"{settings.to} {state}, for {count} reason{'s' if count != 1 else ''}:"]
    lines += [f"  - {reason}" for reason in outcome.refusals[:SHOWN]]
    if count > SHOWN:
        lines.append(f"  - and {count - SHOWN} more")
    lines.append(f"The folder is kept: {outcome.folder}. Mend it at the source and run again.")
    return "\n".join(lines)


def told(settings: ReleaseSettings, outcome: Outcome) -> str:
    """Where it is, and the next command."""
    if outcome.pushed is not None:
        return f"{outcome.pushed.url}\nRead back and found equal to {outcome.folder}."
    seen = "public" if settings.public else "private"
    return (
        f"Nothing was uploaded. Read {outcome.folder / 'README.md'}, then run the same command "
        f"with --push ({settings.to}, {seen})."
    )
