"""From the keys of a foreign checkpoint to ours. Rules are data; a plan is checked whole before
any tensor is read, so that nothing is dropped, doubled or invented."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Shape = tuple[int, ...]
Change = Callable[[Tensor], Tensor]

MOST_SHOWN = 5
"""Faults of one sort that an error lists; the rest are counted."""


@dataclass(frozen=True)
class Rule:
    """What becomes of the keys that `pattern` (a regular expression) matches as a whole.

    `name`: our key, with `\\1` for the first group; `change` is applied to the tensor. Without a
    `name` the key is ignored, for the `reason` given.
    """

    pattern: str
    name: str | None = None
    change: Change | None = None
    reason: str = ""


def ignored(pattern: str, reason: str) -> Rule:
    return Rule(pattern, reason=reason)


def below(rules: Iterable[Rule], foreign: str, ours: str = "") -> list[Rule]:
    """`rules` one level down: foreign keys start with `foreign` (plain text), ours with `ours`."""
    return [
        replace(
            rule,
            pattern=re.escape(foreign) + rule.pattern,
            name=None if rule.name is None else ours + rule.name,
        )
        for rule in rules
    ]


@dataclass(frozen=True)
class Plan:
    """Foreign key -> our key and change, and foreign key -> why it is left out."""

    placed: dict[str, tuple[str, Change | None]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    def place(self, key: str, value: Tensor) -> tuple[str, Tensor] | None:
        """Our key and tensor for a foreign one; None if it is left out."""
        if key in self.ignored:
            return None
        name, change = self.placed[key]
        return name, (value if change is None else change(value)).contiguous()


def make_plan(
    shapes: Mapping[str, Shape],
    rules: Sequence[Rule],
    expected: Mapping[str, Shape],
    where: str,
) -> Plan:
    """Decide about every key of `shapes` (foreign); the first rule that matches counts.

    `expected`: every tensor that our module needs, each of which must come from exactly one key.
    Raises `ValueError` that starts with `where` and lists keys that no rule knows, tensors that
    nothing fills or two keys fill, and wrong shapes.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    plan = Plan()
    faults: dict[str, list[str]] = {}
    sources: dict[str, str] = {}
    for key, shape in shapes.items():
        found = ((p.fullmatch(key), rule) for p, rule in compiled)
        match, rule = next(((m, rule) for m, rule in found if m), (None, None))
        if match is None or rule is None:
            faults.setdefault("unknown keys", []).append(f"{key} {list(shape)}")
        elif rule.name is None:
            plan.ignored[key] = rule.reason
        else:
            name = match.expand(rule.name)
            plan.placed[key] = (name, rule.change)
            if problem := _misfit(name, shape, rule.change, expected, sources):
                faults.setdefault(problem[0], []).append(f"{key}{problem[1]}")
            sources[name] = key
    if missing := [name for name in expected if name not in sources]:
        faults["nothing in the file for"] = missing
    if faults:
        raise ValueError(f"{where}: {_list(faults)}")
    return plan


def _misfit(
    name: str,
    shape: Shape,
    change: Change | None,
    expected: Mapping[str, Shape],
    sources: Mapping[str, str],
) -> tuple[str, str] | None:
    """What is wrong with filling `name` from a tensor of `shape`: sort of fault, and details."""
    if name not in expected:
        return "keys without a place in the model", f" (would be {name})"
    if name in sources:
        return "two keys for one tensor", f" and {sources[name]} ({name})"
    try:
        changed = (
            shape if change is None else tuple(change(torch.empty(shape, device="meta")).shape)
        )
    except (RuntimeError, IndexError):
        changed = shape
    if changed != tuple(expected[name]):
        return "wrong shapes", f" {list(changed)}, expected {list(expected[name])}"
    return None


def _list(faults: Mapping[str, Sequence[str]]) -> str:
    parts = []
    for title, items in faults.items():
        more = f", and {len(items) - MOST_SHOWN} more" if len(items) > MOST_SHOWN else ""
        parts.append(f"{title}: {', '.join(items[:MOST_SHOWN])}{more}.")
    return "\n".join(parts)
