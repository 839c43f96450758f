"""The report as Markdown, with its pictures as files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import singledispatch

from train.search.report.blocks import Block, Code, Document, Pictures, Table, Terms, Text, Tiles


def to_markdown(document: Document) -> str:
    """GitHub's dialect. What programs and people have said is shown, never interpreted."""
    parts = [f"# {_plain(document.title)}", *_blocks(document.opening)]
    for section in document.sections:
        parts += [f"{'#' * section.level} {_plain(section.title)}", *_blocks(section.blocks)]
    return "\n\n".join(parts) + "\n"


def _blocks(blocks: list[Block]) -> Iterator[str]:
    return (_write(block) for block in blocks)


@singledispatch
def _write(block: Block) -> str:
    raise AssertionError(f"no Markdown for {block}")


@_write.register
def _(block: Text) -> str:
    return _plain(block.text)


@_write.register
def _(block: Terms) -> str:
    return "\n".join(f"- **{_plain(term)}**: {_plain(text)}" for term, text in block.terms)


@_write.register
def _(block: Tiles) -> str:
    return "\n".join(f"- **{_plain(number)}** {_plain(label)}" for number, label in block.tiles)


@_write.register
def _(block: Code) -> str:
    longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{_plain(block.title)}:\n\n{fence}\n{block.text}\n{fence}"


@_write.register
def _(block: Table) -> str:
    aligned = (":--", *[":--" if block.words else "--:"] * (len(block.headings) - 1))
    lines = [_line(block.headings), _line(aligned, raw=True)]
    for row in block.rows:
        lines.append(_line(row.cells, strong=row.strong))
    title = f"{_plain(block.title)}\n\n" if block.title else ""
    return title + "\n".join(lines)


@_write.register
def _(block: Pictures) -> str:
    return "\n\n".join(f"![{_plain(each.alt)}]({each.name}.png)" for each in block.pictures)


def _line(cells: tuple[str, ...], strong: bool = False, raw: bool = False) -> str:
    shown = cells if raw else tuple(_plain(cell) for cell in cells)
    return "| " + " | ".join(f"**{cell}**" if strong and cell else cell for cell in shown) + " |"


def _plain(text: str) -> str:
    """One line without anything that Markdown or HTML would take for its own."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
