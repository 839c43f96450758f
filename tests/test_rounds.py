"""Ratios that a drifting machine does not move."""

from __future__ import annotations

import pytest

from eval.speed.rounds import compare


class Machine:
    """A clock that runs slower and slower while work is done."""

    def __init__(self) -> None:
        self.now, self.speed, self.order = 0.0, 1.0, ""

    def work(self, name: str, amount: float) -> None:
        self.order += name
        self.now += amount / self.speed
        self.speed *= 0.97


def test_the_ratio_is_that_of_the_work_though_the_machine_slows_down():
    machine = Machine()
    variants = {"a": lambda: machine.work("a", 6.0), "b": lambda: machine.work("b", 2.0)}
    base, fast = compare(variants, rounds=9, clock=lambda: machine.now)
    assert base.median == 1 and set(base.rounds) == {1.0}
    assert fast.median == pytest.approx(3, rel=0.05)
    assert min(fast.rounds) < 3 < max(fast.rounds)
    assert str(fast) == f"{fast.median:.2f} ({min(fast.rounds):.2f}-{max(fast.rounds):.2f})"
    one_after_the_other = sum(6 * 0.97**-i for i in range(9)) / sum(
        2 * 0.97 ** -(9 + i) for i in range(9)
    )
    assert abs(one_after_the_other - 3) > 0.5, "without alternation the drift would show"


def test_every_round_runs_every_variant_in_a_rotating_order_after_a_warm_up():
    machine = Machine()
    variants = {name: lambda name=name: machine.work(name, 1.0) for name in "abc"}
    compare(variants, rounds=4, clock=lambda: machine.now)
    assert machine.order == "abc" + "abc" + "bca" + "cab" + "abc"


def test_there_must_be_something_to_compare():
    with pytest.raises(ValueError, match="nothing to compare"):
        compare({"a": lambda: None})
