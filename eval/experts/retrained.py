"""Checkpoints trained again without an expert, beside ones that have it, run by run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eagle_moe.schema import nearest
from eagle_moe.scores.identity import hash_weights
from eval.experts.asking import Asked, Asking, expert_names
from eval.experts.differences import compare
from eval.experts.matrix import Retrained, Run


@dataclass(frozen=True)
class Others:
    """Checkpoints to set beside the model that is explained.

    - `without[expert]`: trained again without it, the k-th with the k-th seed.
    - `again`: trained again with every expert, with the second seed, the third and so on; the
      model itself is of the first.
    """

    without: Mapping[str, Sequence[str | Path]]
    again: Sequence[str | Path] = ()

    def check(self, model: str | Path, experts: Sequence[str]) -> None:
        """Raise `FileNotFoundError` or `ValueError` for what cannot be compared, before any is
        loaded."""
        for name, folders in self.without.items():
            if name not in experts:
                raise ValueError(
                    f'retrained: the model has no expert "{name}".{nearest(name, experts)}'
                )
            rest = [one for one in experts if one != name]
            for folder in folders:
                _check_experts(f"retrained: {folder}", folder, f"the model without {name}", rest)
            if len(folders) > 1 + len(self.again):
                raise ValueError(
                    f"retrained: {len(folders)} models without {name}, but {1 + len(self.again)} "
                    "with it. Give one more of the latter with `again` for each further seed."
                )
        for folder in self.again:
            _check_experts(f"again: {folder}", folder, "the model", experts)
        most = max(map(len, self.without.values()), default=0)
        if self.again and len(self.again) >= most:
            raise ValueError(
                f"again: {len(self.again)} further models with every expert, but no expert has "
                f"{1 + len(self.again)} models without it. Give more with `retrained`."
            )
        for folders in ([model, *self.again], *self.without.values()):
            _check_different(folders)

    def measure(self, asking: Asking, model: Asked) -> dict[str, Retrained]:
        """Ask them all, one after another; `model` is what the model itself gave."""
        firsts = [model, *map(asking.ask, self.again)]
        made = {}
        for name, folders in self.without.items():
            seconds = map(asking.ask, folders)
            pairs = list(zip(firsts, seconds, strict=False))  # not every expert has every seed
            made[name] = Retrained(
                runs=[_run(first, second) for first, second in pairs],
                lost=compare([(first.measured, second.measured) for first, second in pairs]),
            )
        return made


def _run(first: Asked, second: Asked) -> Run:
    lost = compare([(first.measured, second.measured)])
    return Run(
        model=second.folder,
        weights_sha256=second.weights_sha256,
        beside=first.folder,
        beside_sha256=first.weights_sha256,
        lost={m: {part: one.value for part, one in parts.items()} for m, parts in lost.items()},
    )


def _check_experts(told: str, folder: str | Path, of: str, expected: Sequence[str]) -> None:
    found = expert_names(folder)
    if found != list(expected):
        raise ValueError(
            f"{told} has the experts {', '.join(found)}, but {of} has {', '.join(expected)}."
        )


def _check_different(folders: Sequence[str | Path]) -> None:
    """Two runs with the same weights are one run."""
    seen: dict[str, str | Path] = {}
    for folder in folders:
        weights = hash_weights(folder)
        if weights in seen:
            raise ValueError(
                f"{folder}: the same weights as {seen[weights]}. Give trainings of different seeds "
                "(python -m train.again --seed N)."
            )
        seen[weights] = folder
