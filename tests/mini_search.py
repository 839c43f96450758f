"""What a report is written of: the choice and the facts of a small search, made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from train.search.report import Clock, Reuse, SearchFacts
from train.search.rounds import Candidate, Choice, Interval, Proxy, Round
from train.search.trial import Cost

EXPERTS = ("clip", "convnext", "sam", "eva02", "pix2struct")
TASKS = ("text", "chart", "shapes", "handwriting")
SCALE = {"clip": 1.0, "convnext": 1.2, "sam": 0.8, "eva02": 0.9, "pix2struct": 1.1}


def candidate(names: str, added: str | None, mean: float, gain: float | None, **more: Any) -> Any:
    """A mixture of the mini search: gains are known to two points, scores to four."""
    members = tuple(names.split())
    size = sum(SCALE[name] for name in members)
    fields: dict[str, Any] = {
        "score": Interval(mean, mean - 0.04, mean + 0.04),
        "gain": None if gain is None else Interval(gain, gain - 0.02, gain + 0.02),
        "verdict": None,
        "seeds": (0, 1),
        "tasks": {task: round(mean + (i - 1.5) / 10, 4) for i, task in enumerate(TASKS)},
        "cost": Cost(1e5 + 3.5e5 * size, 5e7 * size, 120 / size),
    }
    if gain is not None:
        fields["verdict"] = (
            "better" if gain > 0.02 else "worse" if gain < -0.02 else ("not distinguishable")
        )
    return Candidate(members, added, **fields | more)


def broken(names: str, added: str, verdict: Any, **more: Any) -> Candidate:
    return Candidate(tuple(names.split()), added, None, None, verdict, **more)


def mini_choice() -> Choice:
    start = candidate("clip", None, 0.24, None)
    winner = candidate("clip convnext", "convnext", 0.31, 0.07)
    first = Round(
        1,
        start,
        (
            winner,
            candidate("clip sam", "sam", 0.25, 0.01),
            candidate("clip eva02", "eva02", 0.20, -0.04),
            broken("clip pix2struct", "pix2struct", "dropped", proxy=0.11),
        ),
        winner.members,
        'noise-aware: +convnext is better by 7.0 <points> than "clip".',
        hinges_on=("text",),
        proxies=(Proxy(0.25, 4, 3, 0.67),),
    )
    error = "ValueError: expert `sam`: <script>alert(1)</script>\nlog: stages/9f/log.txt"
    second = Round(
        2,
        replace(winner, gain=None, verdict=None),
        (
            broken("clip convnext sam", "sam", "failed", error=error),
            candidate("clip convnext eva02", "eva02", 0.315, 0.005, seeds=(0, 1, 2)),
            candidate("clip convnext pix2struct", "pix2struct", 0.30, -0.01),
        ),
        None,
        "noise-aware: nothing is better than what there is.",
    )
    return Choice(winner.members, (first, second), "greedy", "noise_aware")


def mini_facts() -> SearchFacts:
    rows = [
        {"key": "b" * 64, "members": ["clip", "sam"], "status": "failed", "score": None, "seed": 1},
        {"key": "a" * 64, "members": ["clip"], "status": "done", "score": 0.24, "seed": 0},
        {"key": "b" * 64, "members": ["clip", "sam"], "status": "done", "score": 0.25, "seed": 1},
        {
            "key": "c" * 64,
            "members": ["clip", "eva02"],
            "status": "failed",
            "score": None,
            "seed": 0,
            "error": "killed | by *hand*",
            "log": "OUT/log.txt",
        },
    ]
    return SearchFacts(
        "Search on the built-in suite",
        EXPERTS,
        ("clip",),
        ledger=tuple({"steps": 200, "budget": 1.0, "seconds": 9.5} | row for row in rows),
        reuse=Reuse(2_400, 6_000, 5, 17, stages=18, stages_without_reuse=22),
        clock=Clock(1_830.0, 3_000.0, 7_500.0, "2026-11-21 09:00", "2026-11-21 09:31"),
        settings={"recipe": "configs/recipes/mini.yaml", "rule": {"name": "noise_aware"}},
        fingerprints={"recipe": "sha256:12", "data": "sha256:34", "code": "0.1.0+abc"},
        versions={"python": "3.11", "torch": "2.15"},
        machine="Some CPU, 2 cores",
        notes=("align: feature cache refused, as it does not pay.",),
    )
