from __future__ import annotations

import pytest

from eagle_moe.registry import Registry


def make() -> Registry:
    registry: Registry = Registry("fruit")
    registry.register("pear")(int)
    registry.register("apple")(str)
    return registry


def test_register_look_up_and_iterate():
    registry = make()
    assert registry["pear"] is int
    assert "apple" in registry
    assert "plum" not in registry
    assert list(registry) == ["apple", "pear"]


def test_unknown_kind_names_what_and_the_nearest():
    with pytest.raises(ValueError, match=r'no fruit of kind "aple"\. Did you mean "apple"\?'):
        make()["aple"]


def test_a_kind_belongs_to_one_class():
    registry = make()
    registry.register("pear")(int)
    with pytest.raises(AssertionError, match="pear"):
        registry.register("pear")(str)
