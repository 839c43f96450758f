"""`python -m train.search SEARCH.yaml [key.sub=value ...] [--out DIR] [--dry-run]`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from train.jobs import DirectoryBusy, JobsFailed
from train.search.inputs import resolve
from train.search.outlook import show_outlook
from train.search.run import run_search
from train.search.settings import load_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 chosen, 1 what the search starts from could not be made, 2 an error that the
    message explains, 128 + signal if it was stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m train.search", description="Choose the experts of a mixture."
    )
    parser.add_argument("search", help="path of the search (YAML)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="seeds=[0,1] rule.level=0.95"
    )
    parser.add_argument("--out", type=Path, help="default: runs/search-NAME")
    parser.add_argument("--dry-run", action="store_true", help="check, show what would run, stop")
    parser.add_argument(
        "--retry-failed", action="store_true", help="run trials again that have failed"
    )
    told = parser.parse_intermixed_args(arguments)
    try:
        settings = load_settings(told.search, told.overrides)
        if told.dry_run:
            show_outlook(resolve(settings))
            return 0
        run_search(settings, told.out or Path("runs", f"search-{settings.name}"), told.retry_failed)
        return 0
    except KeyboardInterrupt:  # between two rounds; while jobs run, their runner sees to it
        return 128 + signal.SIGINT
    except JobsFailed as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError, DirectoryBusy) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
