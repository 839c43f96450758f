"""Colours and fonts of every picture on our pages, and a panel as SVG text."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#22262b"
FAINT = "#6b7178"
RULE = "#d9dce1"
PANEL = (3.5, 2.1)
"""Inches of a panel. Text is 9 pt, so that a panel as wide as a phone is legible."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": RULE,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Fonts and colours of every panel; draws without a display."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        yield


def to_svg(name: str, draw: Callable[[Axes], None], size: tuple[float, float] = PANEL) -> str:
    """One panel as an `<svg>` element whose text stays text. `name` keeps its ids apart."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with house_style(), mpl.rc_context({"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        target = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(target, format="svg", transparent=True, metadata=no_metadata)
    svg = target.getvalue()
    return svg[svg.index("<svg") :]


def to_png(draw: Callable[[Axes], None], size: tuple[float, float] = PANEL) -> bytes:
    """The same panel as a PNG, for documents that take no SVG."""
    from matplotlib.figure import Figure

    with house_style():
        figure = Figure(figsize=size, layout="constrained", dpi=160, facecolor="white")
        draw(figure.subplots())
        target = io.BytesIO()
        figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()
