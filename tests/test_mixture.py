"""Mixture: weights are times per epoch, the choice is fixed by the seed and by nothing else."""

import json
from collections import Counter

import pytest

from train.data import DataSpec, build_dataset, order_of


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
        dataset.count([dataset[index]["seen"]])
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


def test_lengths_are_in_the_order_of_the_samples(tiny_processor, sources):
    dataset = mixture(tiny_processor, sources, 0.5, 1.0, 2.34)
    lengths = dataset.lengths()
    encoded = [dataset.encode(index) for index in range(len(dataset))]
    assert lengths.tokens.tolist() == [len(item.input_ids) for item in encoded]
    assert lengths.supervised.tolist() == [item.supervised for item in encoded]
    assert [dataset.name_of(index).split(": ")[1] for index in range(len(dataset))] == ids(dataset)


def test_like_lengths_come_together_on_request(tiny_processor, sources):
    dataset = mixture(tiny_processor, sources, 1.0)
    assert order_of(dataset, 0, 2).work is None
    dataset.sort_by_work()
    assert order_of(dataset, 0, 2).work.tokens.tolist() == dataset.lengths().tokens.tolist()


def test_whole_weights_take_no_memory_per_sample(tiny_processor, sources):
    dataset = mixture(tiny_processor, sources, 1.0, 3.0)
    assert len(dataset) == 10 + 21
    assert sum(extra.nbytes for extra in dataset._extra) == 0
    assert dataset.parts[0]._kept is None


def test_what_a_mixture_has_not_is_an_index_error(tiny_processor, sources):
    dataset = mixture(tiny_processor, sources, 1.0)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            dataset[index]


def test_counts_survive_a_restart(tiny_processor, sources):
    first, second = (mixture(tiny_processor, sources, 1.0, 1.0) for _ in range(2))
    first.count([first[12]["seen"]])
    second.load_state_dict(first.state_dict())
    assert second.counts()["seen"] == 1
    assert second.parts[1].counts()["seen"] == 1


def test_the_identity_tells_mixtures_apart(tiny_processor, sources):
    base = mixture(tiny_processor, sources, 1.0, 1.0).identity
    assert base == mixture(tiny_processor, sources, 1.0, 1.0).identity
    others = [
        mixture(tiny_processor, sources, 1.0, 2.0).identity,
        mixture(tiny_processor, sources, 1.0).identity,
        mixture(tiny_processor, sources, 1.0, 1.0, seed=1).identity,
        mixture(tiny_processor, sources[::-1], 1.0, 1.0).identity,
    ]
    assert base not in others
