"""The 18 benchmarks of the Eagle paper (arXiv 2408.15998), its average, and what it published.

`python -m eval.run --tasks paper` scores a model on them; `python -m eval.paper OUT` prints the
scores beside the paper's.
"""

from eval.paper.benchmarks import BENCHMARKS, TASKS, Benchmark, check_average, eagle_average
from eval.paper.published import Row, read_published

__all__ = [
    "BENCHMARKS",
    "TASKS",
    "Benchmark",
    "Row",
    "check_average",
    "eagle_average",
    "read_published",
]
