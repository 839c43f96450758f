"""Write a search's report again: python -m train.search.report OUT"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from train.search.report.summary import read_summary
from train.search.report.write import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit status: 0 written, 2 an error that the message explains."""
    parser = argparse.ArgumentParser(
        prog="python -m train.search.report",
        description="Write a search's report again, from its summary.json and ledger.jsonl.",
    )
    parser.add_argument("out", help="the folder that the search wrote into")
    given = parser.parse_args(arguments)
    try:
        choice, facts = read_summary(given.out)
        paths = write_report(choice, facts, given.out)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
