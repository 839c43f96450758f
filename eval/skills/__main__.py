"""`python -m eval.skills --out DIR`: write the built-in suite."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from eval.skills.suite import write_suite


def main(arguments: Sequence[str] | None = None) -> None:
    """Write it, with a bar. Mistakes of the person end in one line, code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.skills", description="Write the built-in suite to disk."
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=2000, help="training images per skill")
    parser.add_argument("--test", type=int, default=250, help="test images per skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    told = vars(parser.parse_args(arguments))
    for option in ("train", "test", "workers"):
        if told[option] < 1:
            parser.exit(2, f"error: --{option} {told[option]}: must be at least 1.\n")
    try:
        with Progress() as bar:
            task = bar.add_task("images", total=None)
            write_suite(
                **told, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
    except OSError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
