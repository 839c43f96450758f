"""The paper's own rows, as reference to compare with; read and checked from `published.yaml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from eagle_moe.schema import Schema, nearest, read_yaml
from eval.paper.benchmarks import BY_NAME, ROUNDING, check_average

PUBLISHED = Path(__file__).with_name("published.yaml")


class Row(Schema):
    """What was published of one model; `scores` and averages in the paper's units.

    - `average`: as printed. `recomputed`: from all parts of the row, where it is another one.
    - `without_vizwiz`: recomputed from the ten other parts, 0 to 1000.
    """

    model: str
    source: str
    scores: dict[str, float] = {}
    average: float | None = Field(None, ge=0, le=1000)
    recomputed: float | None = Field(None, ge=0, le=1000)
    without_vizwiz: float | None = Field(None, ge=0, le=1000)

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name, score in self.scores.items():
            if name not in BY_NAME:
                raise ValueError(f'no benchmark is called "{name}".{nearest(name, BY_NAME)}')
            if not 0 <= score <= BY_NAME[name].best:
                raise ValueError(f"{name} = {score:g}: it goes from 0 to {BY_NAME[name].best:g}")
        return self

    @property
    def follows(self) -> bool:
        """Whether the printed average is what the row's own parts give, as far as is known."""
        if self.average is None or self.recomputed is None:
            return True
        return abs(self.average - self.recomputed) <= ROUNDING

    @property
    def vizwiz(self) -> float | None:
        """What the average and that of the ten others leave for VizWiz, in percent."""
        if self.average is None or self.without_vizwiz is None:
            return None
        return (11 * self.average - 10 * self.without_vizwiz) / 10


@cache
def read_published(path: Path = PUBLISHED) -> tuple[Row, ...]:
    """Every row, in the order of the file.

    Raises `ValueError` for a cell off its scale, and for a printed average that does not follow
    from its parts without the row saying so (`recomputed`).
    """
    rows = []
    for table in read_yaml(path.read_text(encoding="utf-8"), str(path)):
        rows += [_read_row(row, table["source"], path) for row in table["rows"]]
    return tuple(rows)


def _read_row(data: dict[str, Any], source: str, path: Path) -> Row:
    where = f"{path.name}: {source}, {data.get('model')}"
    row = Row.parse(data | {"source": source}, where)
    average = row.average if row.recomputed is None else row.recomputed
    if average is not None:
        check_average(average, row.scores, where)
    if row.vizwiz is not None and not 0 <= row.vizwiz <= BY_NAME["VizWiz"].best:
        raise ValueError(f"{where}: its two averages leave {row.vizwiz:.1f} for VizWiz.")
    return row
