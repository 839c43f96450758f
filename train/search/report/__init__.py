"""The report of a search: what was decided, why, on which evidence, at which cost.

write_report(choice, facts, out)     # report.md, report.html, pictures, summary.json
python -m train.search.report OUT    # the same files again, from summary.json and ledger.jsonl
"""

from train.search.report.facts import Clock, Reuse, SearchFacts
from train.search.report.write import write_report

__all__ = ["Clock", "Reuse", "SearchFacts", "write_report"]
