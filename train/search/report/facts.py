"""What a report tells beside the decisions: what was run, what it cost, what it was made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from train.search.trial import Members


@dataclass(frozen=True)
class Reuse:
    """Work done, and what a search that shares nothing would have done. Equal in two like searches.

    - `steps`: optimizer steps of all stages that this search ran.
    - `steps_without_reuse`: if every trial had run every stage for itself.
    - `pre_alignments`: runs of one expert alone that this search made; `experts_found` more were
      in the store before it began.
    - `stages`: runs of stages that train mixtures.
    """

    steps: int
    steps_without_reuse: int
    pre_alignments: int
    pre_alignments_without_reuse: int
    experts_found: int = 0
    stages: int = 0
    stages_without_reuse: int = 0


@dataclass(frozen=True)
class Clock:
    """What the clock said, in seconds: different in every run, so a report keeps it apart.

    - `wall`: from start to end, over all sittings of an interrupted search.
    - `jobs`: sum over the jobs that ran, side by side or not.
    - `jobs_without_reuse`: if each had run as often as it was needed.
    - `started`, `finished`: as people write a date.
    """

    wall: float | None = None
    jobs: float | None = None
    jobs_without_reuse: float | None = None
    started: str = ""
    finished: str = ""


@dataclass(frozen=True)
class SearchFacts:
    """All of a search's report but the `Choice`.

    - `pool`: in mixture order. `base`: what the search starts from.
    - `ledger`: the rows of OUT/ledger.jsonl: `key`, `members`, `status`, `score`, `seed`, and where
      known `budget`, `steps`, `error`, `log`, `seconds`. Of rows with the same key the last counts.
    - `finished`: False for a report of what is known so far.
    - `settings`: of the search, resolved, as plain data.
    - `fingerprints`: what identifies the inputs, such as `{"recipe": hash, "data": hash, "code":
      version, "search": hash}`.
    - `versions`: library -> version (`eval.identity.library_versions`); `machine`: hardware in one
      line, or one per node.
    - `notes`: sentences with what was measured, such as why there is a feature cache or none.
    """

    title: str
    pool: Members
    base: Members
    ledger: tuple[Mapping[str, Any], ...] = ()
    finished: bool = True
    reuse: Reuse | None = None
    clock: Clock = Clock()
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    notes: tuple[str, ...] = ()

    @property
    def last_rows(self) -> list[Mapping[str, Any]]:
        """The last row of every trial, small mixtures first: rows of a ledger stand as trials end,
        which is another order in every run."""
        last = {row["key"]: row for row in self.ledger}
        return sorted(last.values(), key=self._rank)

    def _rank(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        places = {name: place for place, name in enumerate(self.pool)}
        members = [places.get(name, len(places)) for name in row["members"]]
        return len(members), members, row.get("budget", 1.0), row["seed"], row["key"]

    def dump(self) -> dict[str, Any]:
        """Plain data for JSON, without the ledger, which has a file of its own."""
        plain = asdict(self)
        del plain["ledger"]
        return plain
