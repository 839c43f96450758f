"""What each expert adds, per skill and per image: `python -m eval.experts`.

    matrix = explain_experts(model, data, out)     # experts.json, items.jsonl.gz, page and picture

The claim is counterfactual: an expert's map is replaced by the mean of its maps over a reference
set of images (`eagle_moe.explain`), and answers get worse or do not. Maps of single images, made
of gradients, are hints beside it.
"""

from eval.experts.differences import METRICS
from eval.experts.matrix import MATRIX, Matrix, Retrained, Run
from eval.experts.measure import Measured, read_measured
from eval.experts.run import explain_experts

__all__ = [
    "MATRIX",
    "METRICS",
    "Matrix",
    "Measured",
    "Retrained",
    "Run",
    "explain_experts",
    "read_measured",
]
