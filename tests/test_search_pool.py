"""Pools of experts: their order, their base, and what they refuse."""

from __future__ import annotations

import subprocess
import sys

import pytest

from train.search.pool import Pool

POOL = Pool(("clip", "convnext", "sam"), ("convnext", "clip"))


def test_mixtures_are_in_the_order_of_the_pool():
    assert POOL.base == ("clip", "convnext")
    assert POOL.members({"sam", "clip"}) == ("clip", "sam")
    assert POOL.outside(("clip",)) == ("convnext", "sam")


@pytest.mark.parametrize(
    ("names", "base", "message"),
    [
        ((), (), "pool: it is empty"),
        (("clip", "sam", "clip"), (), 'pool: "clip" is named twice'),
        (("clip", "sam"), ("sam", "sam"), 'base: "sam" is named twice'),
        (("clip", "convnext"), ("convnxt",), 'base: "convnxt" .* Did you mean "convnext"'),
    ],
)
def test_a_pool_that_cannot_be_searched_is_refused(names, base, message):
    with pytest.raises(ValueError, match=message):
        Pool(names, base)


def test_all_that_decides_works_without_torch():
    code = (
        "import sys; import train.search.replay, train.search.noise; "
        "assert 'torch' not in sys.modules and 'eagle_moe' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
