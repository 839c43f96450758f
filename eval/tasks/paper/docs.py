"""Which questions of a data set are asked."""

from __future__ import annotations

from typing import Any


def images_only(dataset: Any) -> Any:
    """Those about images, of SEED-Bench. Its pictures are not decoded for this."""
    return dataset.filter(lambda kind: kind == "image", input_columns=["data_type"])
