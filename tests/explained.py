"""Models that are explained: two tiny experts, and the same with fewer, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eval.experts import Matrix, explain_experts
from tests.conftest import make_model

EXPERTS = ("clip", "convnext")
"""Of `tiny_folder`."""


def save(folder: Path, config: Any, processor: Any, seed: int = 3) -> Path:
    make_model(config, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(model: Path, data: Path, out: Path, **options: Any) -> Matrix:
    told = {"reference": 5, "images": 0, "batch_size": 4, "device": "cpu"} | options
    return explain_experts(model, data, out, **told)


def resampled(values: list[float]) -> tuple[float, float]:
    """The paired bootstrap by hand: questions are drawn, each with its own difference."""
    draws = np.random.default_rng(1).choice(values, (20_000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
