"""The experts that a search may choose from, in the order in which a mixture holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from train.search.trial import Members


@dataclass(frozen=True)
class Pool:
    """`names` in mixture order; every mixture that is tried contains `base`.

    Without a base a forward search starts from single experts. Raises `ValueError` for an empty
    pool, for a name that occurs twice and for a base that is not in the pool.
    """

    names: Members
    base: Members = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("pool: it is empty. Name the experts to choose from.")
        for field, names in (("pool", self.names), ("base", self.base)):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f'{field}: "{twice[0]}" is named twice. Name every expert once.')
        object.__setattr__(self, "base", self.members(self.base, "base"))

    def members(self, names: Iterable[str], field: str = "members") -> Members:
        """The mixture of `names`, in pool order. `ValueError` names `field` and what is unknown."""
        wanted = set(names)
        unknown = sorted(wanted - set(self.names))
        if unknown:
            from eagle_moe.schema import nearest  # imports torch: only to say what is wrong

            raise ValueError(
                f'{field}: "{unknown[0]}" is not in the pool.{nearest(unknown[0], self.names)}'
            )
        return tuple(name for name in self.names if name in wanted)

    def outside(self, members: Members) -> Members:
        """Experts of the pool that are not among `members`."""
        return tuple(name for name in self.names if name not in members)
