"""Which samples share a row: every sample in one, no row too long, rows as full as they can be."""

import numpy as np
import pytest

from train.data.packing import fewest_rows, plan_rows


def mixture_lengths(count, seed=0, limit=8192, mean=248, sigma=0.9, text_only=0.15):
    """1024 image tokens and lognormal text, as in the training data of Eagle; some text alone."""
    rng = np.random.default_rng(seed)
    text = np.exp(rng.normal(np.log(mean) - sigma**2 / 2, sigma, count)).astype(int).clip(8)
    images = (rng.random(count) >= text_only).astype(int)
    return np.minimum(text + 1024 * images, limit), images


@pytest.mark.parametrize("limit", [2048, 4096, 8192])
def test_every_sample_is_in_one_row_and_no_row_is_too_long(limit):
    tokens, images = mixture_lengths(5000, limit=limit)
    plan = plan_rows(tokens, images, limit, seed=1)
    assert sorted(plan.order.tolist()) == list(range(5000))
    totals = plan.totals(tokens)
    assert totals.max() <= limit
    assert totals.tolist() == [tokens[plan.row(n)].sum() for n in range(len(plan))]
    assert min(len(plan.row(n)) for n in range(len(plan))) >= 1


@pytest.mark.parametrize("text_only", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("sigma", [0.7, 0.9])
@pytest.mark.parametrize("limit", [4096, 5120, 6144, 8192])
def test_rows_are_as_full_as_they_can_be(limit, sigma, text_only):
    tokens, images = mixture_lengths(8_000, 0, limit, sigma=sigma, text_only=text_only)
    rows = len(plan_rows(tokens, images, limit))
    assert fewest_rows(tokens, limit) <= rows <= 1.005 * fewest_rows(tokens, limit)


def test_fewer_images_than_fit_are_tried_where_that_is_better(monkeypatch):
    """At 4608 tokens a fourth image fits beside the shortest texts alone."""
    tokens, images = mixture_lengths(10_000, limit=4608, sigma=0.7)
    rows = len(plan_rows(tokens, images, 4608))
    monkeypatch.setattr("train.data.packing._SPARE", (-1.0,))
    assert rows < 0.99 * len(plan_rows(tokens, images, 4608))


def test_deliberate_mistake_text_before_images():
    tokens, images = mixture_lengths(20_000, limit=4096)
    assert len(plan_rows(tokens, 1 - images, 4096)) > 1.05 * fewest_rows(tokens, 4096)


def fewest_by_trying(lengths, limit):
    """The least number of rows, by putting every sample into every row."""
    best = len(lengths)

    def put(at, rows):
        nonlocal best
        if len(rows) >= best:
            return
        if at == len(lengths):
            best = len(rows)
            return
        for row in range(len(rows)):
            if rows[row] + lengths[at] <= limit:
                put(at + 1, [*rows[:row], rows[row] + lengths[at], *rows[row + 1 :]])
        put(at + 1, [*rows, lengths[at]])

    put(0, [])
    return best


def test_the_fewest_rows_are_never_more_than_there_can_be():
    rng = np.random.default_rng(0)
    exact = 0
    for _ in range(400):
        limit = int(rng.integers(6, 30))
        lengths = rng.integers(1, limit + 1, rng.integers(1, 8))
        least, told = fewest_by_trying(lengths.tolist(), limit), fewest_rows(lengths, limit)
        assert told <= least <= len(plan_rows(lengths, np.ones_like(lengths), limit))
        exact += told == least
    assert exact > 380  # counting tokens alone: 351


def test_four_quarters_are_one_row_and_three_of_more_than_a_third_are_three():
    assert fewest_rows(np.array([4, 4, 4, 4]), 16) == 1
    assert fewest_rows(np.array([5, 5, 5, 5]), 16) == 2
    assert fewest_rows(np.array([9, 9, 9]), 16) == 3
    assert fewest_rows(np.array([9, 5, 5]), 16) == 2


def test_the_plan_depends_on_the_seed_and_the_lengths_alone():
    tokens, images = mixture_lengths(3000)
    first, again = (plan_rows(tokens, images, 8192, seed=3) for _ in range(2))
    assert np.array_equal(first.order, again.order)
    assert np.array_equal(first.starts, again.starts)
    other = plan_rows(tokens, images, 8192, seed=4)
    assert not np.array_equal(first.order, other.order)


def test_rows_mix_their_sources():
    """Samples come in the order of their files; a row takes them from all over."""
    tokens, images = mixture_lengths(20_000)
    plan = plan_rows(tokens, images, 8192)
    spans = [np.ptp(plan.row(n)) for n in range(len(plan))]
    assert np.median(spans) > 5000


def test_a_sample_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match="sample 1 has 9 tokens, a row takes 8"):
        plan_rows(np.array([3, 9]), np.array([0, 0]), 8)
