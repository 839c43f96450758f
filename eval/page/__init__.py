"""What our HTML pages share: one look, no script, no request; pictures are drawn into them."""

from eval.page.drawing import FAINT, INK, RULE, house_style, to_png, to_svg
from eval.page.markdown import markdown_table
from eval.page.numbers import show_bytes, show_large, show_seconds
from eval.page.render import render

__all__ = [
    "FAINT",
    "INK",
    "RULE",
    "house_style",
    "markdown_table",
    "render",
    "show_bytes",
    "show_large",
    "show_seconds",
    "to_png",
    "to_svg",
]
