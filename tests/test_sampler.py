"""The order of an epoch: of seed and epoch alone; like work together; skipping loads nothing."""

import time

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, Dataset

from train.data.packing import plan_rows
from train.data.sampler import STEPS, EpochSampler, Work, balance, order_of


class Numbers(Dataset):
    """Item i is i; remembers what was loaded."""

    def __init__(self, count):
        self.count = count
        self.loaded = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.loaded.append(index)
        return torch.tensor(index)


def work_of(count, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 4, count)
    return Work(1024 * images + rng.integers(10, 900, count), images)


@pytest.mark.parametrize("work", [None, work_of(1000)], ids=["shuffled", "by work"])
def test_every_item_once_in_an_order_of_seed_and_epoch(work):
    def order(seed, epoch):
        sampler = EpochSampler(1000, seed, 8, work)
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)  # whatever torch's random numbers are
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(1000))
    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("count", [1, 5, 8, 17, 8 * STEPS, 8 * STEPS + 1, 24 * STEPS - 3])
def test_odd_counts_lose_nothing(count):
    assert sorted(EpochSampler(count, 0, 8, work_of(count))) == list(range(count))


def test_random_numbers_of_torch_are_left_alone():
    before = torch.get_rng_state()
    list(EpochSampler(100, 0, 4, work_of(100)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("ranks", [2, 8, 32])
@pytest.mark.parametrize("image_cost", [0, 1024])
def test_processes_have_equal_work(ranks, image_cost):
    """Packed rows of 4096 tokens, of captions and of text alone."""
    rng = np.random.default_rng(0)
    images = (rng.random(20_000) < 0.85).astype(int)
    tokens = np.minimum(1024 * images + rng.lognormal(5.3, 0.9, 20_000).astype(int) + 8, 4096)
    plan = plan_rows(tokens, images, 4096)
    work = Work(plan.totals(tokens), plan.totals(images))
    order = EpochSampler(len(plan), 0, 64, work).order()
    assert balance(work, order, ranks, 1, image_cost) < 1.01
    shuffled = EpochSampler(len(plan), 0, 64).order()  # the measure can fail
    assert balance(work, shuffled, 8, 1, 1024) > 1.03


def test_a_step_has_the_same_items_whatever_the_number_of_processes():
    sampler = EpochSampler(640, 0, 16, work_of(640))

    def steps(processes, batch):
        loaders = [
            prepare_data_loader(
                DataLoader(Numbers(640), batch, sampler=sampler),
                num_processes=processes,
                process_index=rank,
                put_on_device=False,
            )
            for rank in range(processes)
        ]
        shares = [torch.cat(list(loader)).tolist() for loader in loaders]
        per_step = 16 // processes
        return [
            sorted(item for share in shares for item in share[at : at + per_step])
            for at in range(0, 640 // processes, per_step)
        ]

    assert steps(1, 4) == steps(2, 4) == steps(4, 2) == steps(8, 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_epoch_goes_on_where_it_was_and_loads_nothing_before(processes):
    def loader():
        dataset = Numbers(64)
        sampler = order_of(dataset, seed=5, step=4 * processes)
        prepared = prepare_data_loader(
            DataLoader(dataset, 4, sampler=sampler),
            num_processes=processes,
            process_index=processes - 1,
            put_on_device=False,
        )
        prepared.set_epoch(1)
        return dataset, prepared

    _, prepared = loader()
    whole = torch.cat(list(prepared)).tolist()
    dataset, prepared = loader()
    rest = torch.cat(list(skip_first_batches(prepared, 3))).tolist()
    assert rest == whole[12:]
    assert dataset.loaded == rest


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_does_not_depend_on_loader_workers(workers):
    sampler = EpochSampler(40, 0, 4, work_of(40))
    batches = list(DataLoader(Numbers(40), 4, sampler=sampler, num_workers=workers))
    assert torch.cat(batches).tolist() == sampler.order().tolist()


def test_the_middle_of_an_epoch_of_two_million_is_reached_at_once():
    dataset = Numbers(2_000_000)
    loader = prepare_data_loader(
        DataLoader(dataset, 4, sampler=order_of(dataset, 0, 128)), put_on_device=False
    )
    start = time.perf_counter()
    first = next(iter(skip_first_batches(loader, 250_000)))
    assert time.perf_counter() - start < 3
    assert (
        dataset.loaded[:4]
        == first.tolist()
        == order_of(dataset, 0, 128).order()[1_000_000:][:4].tolist()
    )
