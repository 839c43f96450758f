"""What a report is made of: said once, written as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Text:
    """A paragraph. `faint`: an explanation beside the matter."""

    text: str
    faint: bool = False


@dataclass(frozen=True)
class Code:
    """Text as it is, under a title."""

    title: str
    text: str


@dataclass(frozen=True)
class Tiles:
    """A few numbers to see first: (number, what it is)."""

    tiles: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Row:
    """`shades`: per cell a value from 0 to 1 that colours it, or None."""

    cells: tuple[str, ...]
    strong: bool = False
    shades: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Table:
    """The first column names a row. `words`: the others are text. `folded`: long, seldom read."""

    headings: tuple[str, ...]
    rows: tuple[Row, ...]
    title: str = ""
    words: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """One panel: `name` of its file, what it shows in words, its size in inches."""

    name: str
    alt: str
    draw: Callable[[Axes], None]
    size: tuple[float, float]


@dataclass(frozen=True)
class Pictures:
    """Panels side by side, where there is room."""

    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Terms:
    """(term, what it means)."""

    terms: tuple[tuple[str, str], ...]


Block = Text | Terms | Code | Tiles | Table | Pictures


@dataclass(frozen=True)
class Section:
    """`name`: its anchor on the page. `level` 3 is a part of the section before it."""

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)
    level: int = 2


@dataclass(frozen=True)
class Document:
    """`opening` stands under the title, before the first section."""

    title: str
    opening: list[Block]
    sections: list[Section]

    @property
    def pictures(self) -> list[Picture]:
        blocks = [block for section in self.sections for block in section.blocks]
        return [each for block in blocks if isinstance(block, Pictures) for each in block.pictures]
