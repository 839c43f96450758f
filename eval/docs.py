"""Tables in docs/*.md, written from the score cards in docs/scores.

    python -m eval.docs                    # write them again
    python -m eval.docs --demo runs/demo --experts runs/experts   # what these have measured

A page says where a table belongs, and what was there is replaced:

    <!-- table: demo (python -m eval.docs) -->
    <!-- end of table -->

Cards are recounted from their items. Where a number does not follow from its parts nothing is
written, and the command ends with status 2.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from eagle_moe.schema import nearest
from eagle_moe.scores.answer import ITEMS
from eagle_moe.scores.card import CARD, SKILLS, check_total
from eagle_moe.scores.score import TOTAL, Estimate
from eval.experts import MATRIX, Matrix
from eval.experts.words import UNITS, agreement, retrained_rows
from eval.page import markdown_table
from eval.report.results import MODELS, Parts, leads, read_scores
from eval.report.story import accuracy_table, lead_sentences
from eval.report.write import SUMMARY

DOCS = Path(__file__).parents[1] / "docs"
SCORES = "scores"
"""Folder of the cards, below that of the pages."""
BLOCK = re.compile(
    r"(<!-- table: (\S+) \(python -m eval\.docs\) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL
)


def demo_table(scores: Path) -> str:
    """Accuracy of every model of the demo, and the mixture's lead."""
    folder = scores / "demo"
    models = {name: folder / name for name in MODELS if (folder / name / SKILLS / CARD).is_file()}
    cards, answers = read_scores(models)
    accuracy: dict[str, Parts] = {name: card.accuracy for name, card in cards.items()}
    accuracy["chance"] = _chance(folder / SUMMARY, accuracy["mixture"])
    return "\n\n".join((markdown_table(*accuracy_table(accuracy)), *lead_sentences(leads(answers))))


def experts_table(scores: Path) -> str:
    """What is lost without the strongest expert of each skill, silenced and trained again."""
    matrix = Matrix.load(scores / "experts")
    heading = ["skill", "without"]
    for name in UNITS.values():
        heading += [f"{name}: silenced", "trained again", "same sign"]
    rows = [row for row in retrained_rows(matrix) if row[0] != TOTAL]
    return "\n\n".join((markdown_table(heading, rows), agreement(matrix, matrix.skills)))


TABLES: dict[str, Callable[[Path], str]] = {"demo": demo_table, "experts": experts_table}


def render(page: str, scores: Path, name: str) -> str:
    """The text of a page with its tables written anew.

    Raises `ValueError` for a table that there is not, and for cards whose numbers do not follow.
    """

    def write(block: re.Match[str]) -> str:
        table = block[2]
        if table not in TABLES:
            raise ValueError(f'{name}: no table is called "{table}".{nearest(table, TABLES)}')
        return f"{block[1]}\n{TABLES[table](scores)}\n\n{block[4]}"

    return BLOCK.sub(write, page)


def take(scores: Path, demo: Path | None, experts: Path | None) -> None:
    """Copy what the tables are made of out of a run of the demo, and of `eval.experts`."""
    files: dict[Path, Path] = {}
    if demo is not None:
        files[demo / SUMMARY] = scores / "demo" / SUMMARY
        for name in MODELS:
            found = demo / "scores" / name / SKILLS
            if found.is_dir():
                files |= {found / n: scores / "demo" / name / SKILLS / n for n in (CARD, ITEMS)}
    if experts is not None:
        files[experts / MATRIX] = scores / "experts" / MATRIX
    for source in files:
        if not source.is_file():
            raise FileNotFoundError(f"{source}: no such file. Is the run finished?")
    for source, target in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _chance(summary: Path, asked: Parts) -> Parts:
    """Chance as the demo computed it: it needs the training answers, which are not kept here."""
    told = json.loads(summary.read_text(encoding="utf-8"))["chance"]
    chance = {part: Estimate.parse(one, f"{summary}: chance.{part}") for part, one in told.items()}
    try:
        check_total(chance)
    except ValueError as error:
        raise ValueError(f"{summary}: chance: {error}") from None
    if {part: one.n for part, one in chance.items()} != {p: one.n for p, one in asked.items()}:
        raise ValueError(f"{summary}: its chance is of other questions than the mixture was asked")
    return chance


def write_pages(pages: Iterable[Path], scores: Path) -> list[Path]:
    """Write the pages whose tables have changed: all of them, or none if one cannot be."""
    old = {page: page.read_text(encoding="utf-8") for page in pages}
    new = {page: render(text, scores, page.name) for page, text in old.items()}
    changed = [page for page in old if new[page] != old[page]]
    for page in changed:
        page.write_text(new[page], encoding="utf-8")
    return changed


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m eval.docs`."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.docs", description="Write the tables of the docs from score cards."
    )
    parser.add_argument("--demo", type=Path, help="take the scores of this run of the demo first")
    parser.add_argument("--experts", type=Path, help="take the matrix of this `eval.experts` first")
    parser.add_argument("--docs", type=Path, default=DOCS, help=argparse.SUPPRESS)
    told = parser.parse_args(arguments)
    try:
        take(told.docs / SCORES, told.demo, told.experts)
        changed = write_pages(sorted(told.docs.glob("*.md")), told.docs / SCORES)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"written: {', '.join(page.name for page in changed) or 'nothing had changed'}")


if __name__ == "__main__":
    main()
