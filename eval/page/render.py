"""A page as one HTML file: a template that extends `base.html.jinja`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from eval.page.drawing import FAINT, INK, RULE


def render(template: Path, **values: Any) -> str:
    """HTML text of `template`, all `values` escaped; a value that is missing is an error."""
    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template(template.name)
    return page.render(ink=INK, faint=FAINT, rule=RULE, **values)
