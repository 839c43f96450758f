"""The demo's report.

results = gather(scores, data, curves, seconds)
write_report(results, "runs/demo")     # report.html, report.png, summary.json
print_summary(results)
"""

from eval.report.results import (
    CurvePoint,
    DemoResults,
    Probe,
    Sample,
    gather,
    read_curve,
    summarise,
)
from eval.report.write import print_summary, write_report

__all__ = [
    "CurvePoint",
    "DemoResults",
    "Probe",
    "Sample",
    "gather",
    "print_summary",
    "read_curve",
    "summarise",
    "write_report",
]
