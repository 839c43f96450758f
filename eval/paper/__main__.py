"""`python -m eval.paper OUT`: what OUT's cards hold, beside what the paper published.

Without OUT: the page about the benchmarks, in Markdown.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from eagle_moe.scores.card import find_cards
from eval.page import markdown_table
from eval.paper.table import find_rows, measure, render_page, score_table, to_rich


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Scores beside those of the Eagle paper.")
    parser.add_argument("out", nargs="?", help="folder of a run of `--tasks paper`")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--beside", default="X5-7B,X4-8B-Plus", help="published models, or: all")
    options = parser.parse_args(arguments)
    if options.out is None:
        print(render_page(), end="")
        return
    try:
        rows = find_rows([] if options.beside == "all" else options.beside.split(","))
        measured = measure(find_cards(options.out))
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    if not measured.scores and not measured.not_run:
        parser.exit(2, f"{options.out}: no card of the paper's benchmarks. Run `--tasks paper`.\n")
    table = score_table(measured, rows)
    if options.markdown:
        print(markdown_table(*table))
    else:
        Console().print(to_rich(*table))
    for note in measured.notes():
        print(f"\n{note}" if options.markdown else note)


if __name__ == "__main__":
    main()
