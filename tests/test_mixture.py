"""Mixture: weights are times per epoch, the choice is fixed by the seed and by nothing else."""

import json
from collections import Counter

import pytest

from train.data import DataSpec, build_dataset


@pytest.fixture
def sources(tmp_path):
    """Text-only files with 10, 7 and 3 records whose ids tell the file."""
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]
    paths = []
    for name, count in (("a", 10), ("b", 7), ("c", 3)):
        path = tmp_path / f"{name}.json"
        path.write_text(
            json.dumps([{"id": f"{name}{n}", "conversations": turns} for n in range(count)])
        )
        paths.append(str(path))
    return paths


def ids(dataset):
    return [dataset[index]["id"] for index in range(len(dataset))]


def mixture(processor, sources, *weights, seed=0):
    specs = [
        DataSpec(path=path, weight=weight) for path, weight in zip(sources, weights, strict=False)
    ]
    return build_dataset(specs, processor, 256, seed)


def test_one_source_is_itself(tiny_processor, sources):
    assert ids(mixture(tiny_processor, sources, 1.0)) == [f"a{n}" for n in range(10)]


def test_weights_are_times_per_epoch(tiny_processor, sources):
    seen = Counter(ids(mixture(tiny_processor, sources, 0.5, 1.0, 2.34)))
    times = {name: [seen[f"{name}{n}"] for n in range(10)] for name in "abc"}
    assert sorted(times["a"]) == [0] * 5 + [1] * 5
    assert times["b"] == [1] * 7 + [0] * 3
    assert sorted(times["c"][:3]) == [2, 2, 3]  # 7 samples of 3 records


def test_the_choice_depends_on_the_seed_alone(tiny_processor, sources):
    half = ids(mixture(tiny_processor, sources, 0.5))
    assert half == ids(mixture(tiny_processor, sources, 0.5))
    assert half == ids(mixture(tiny_processor, sources, 0.5, 0.5, 1.0))[:5]
    assert any(half != ids(mixture(tiny_processor, sources, 0.5, seed=n)) for n in (1, 2))


def test_counts_and_names_cover_all_sources(tiny_processor, sources):
    dataset = mixture(tiny_processor, sources, 1.0, 2.0)
    for index in range(len(dataset)):
        dataset.encode(index)
    assert dataset.counts() == {
        "records": 17,
        "skipped": 0,
        "seen": 17,
        "cut": 0,
        "unsupervised": 0,
    }
    assert dataset.named("cut") == []


def test_a_weight_that_leaves_nothing_is_refused(tiny_processor, sources):
    with pytest.raises(ValueError, match=r"weight = 0\.01 of 10 records"):
        mixture(tiny_processor, sources, 0.01)


def test_no_source_and_bad_weights_are_refused(tiny_processor, sources):
    with pytest.raises(ValueError, match="name at least one source"):
        build_dataset([], tiny_processor, 256)
    with pytest.raises(ValueError, match="`weight` = 0"):
        DataSpec.parse({"path": sources[0], "weight": 0}, "recipe.yaml")
