"""A name -> class table with readable errors; one each for experts, fusions and connectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from eagle_moe.schema import nearest

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """Maps a `kind` to a class. Filled by decorator, read by the builders, swept by the tests."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._classes: dict[str, T] = {}

    def register(self, kind: str) -> Callable[[T], T]:
        """Class decorator. Registering a kind twice is a programming error."""

        def add(cls: T) -> T:
            assert kind not in self._classes or self._classes[kind] is cls, kind
            self._classes[kind] = cls
            return cls

        return add

    def __getitem__(self, kind: str) -> T:
        if kind not in self._classes:
            raise ValueError(f'no {self.what} of kind "{kind}".{nearest(kind, self._classes)}')
        return self._classes[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))
