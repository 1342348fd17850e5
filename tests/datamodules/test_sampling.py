from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import DataLoader

from datamodules.sampling import EpochBatchSampler

sizes = st.integers(1, 60)
batches = st.integers(1, 9)
seeds = st.integers(0, 2**31)


@settings(max_examples=60)
@given(sizes, batches, seeds, st.integers(0, 5))
def test_an_epoch_is_a_permutation(n_samples, batch_size, seed, epoch):
    sampler = EpochBatchSampler(n_samples, batch_size, seed)
    sampler.set_epoch(epoch)
    dealt = list(sampler)
    assert sorted(chain(*dealt)) == list(range(n_samples))
    assert len(dealt) == len(sampler)
    assert {len(batch) for batch in dealt[:-1]} <= {batch_size}


@settings(max_examples=40)
@given(sizes, batches, seeds, st.integers(0, 5))
def test_order_depends_on_seed_and_epoch_alone(n_samples, batch_size, seed, epoch):
    used = EpochBatchSampler(n_samples, batch_size, seed)
    for earlier in range(epoch):
        used.set_epoch(earlier)
        list(used)
    torch.rand(3)
    np.random.rand(3)
    fresh = EpochBatchSampler(n_samples, batch_size, seed)
    used.set_epoch(epoch)
    fresh.set_epoch(epoch)
    assert list(used) == list(fresh) == list(fresh)


def test_epochs_and_seeds_differ():
    orders = [
        tuple(EpochBatchSampler(50, 5, seed).order(epoch))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 9


@settings(max_examples=60)
@given(sizes, batches, seeds, st.integers(0, 3), st.data())
def test_resumed_pass_is_the_tail_and_the_next_is_whole(n_samples, batch_size, seed, epoch, data):
    sampler = EpochBatchSampler(n_samples, batch_size, seed)
    sampler.set_epoch(epoch)
    whole = list(sampler)
    start = data.draw(st.integers(0, len(whole)))
    sampler.resume_at(epoch, start)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(whole)
    assert list(sampler) == whole[start:]
    assert list(sampler) == whole


def test_an_unused_iterator_does_not_disarm_the_resume():
    sampler = EpochBatchSampler(10, 2)
    whole = list(sampler)
    sampler.resume_at(0, 3)
    iter(sampler)
    assert list(sampler) == whole[3:]


def test_another_epoch_disarms_the_resume():
    sampler = EpochBatchSampler(10, 2)
    sampler.resume_at(1, 3)
    sampler.set_epoch(2)
    assert len(list(sampler)) == 5


@settings(max_examples=60)
@given(sizes, batches, st.integers(1, 4), st.booleans(), seeds)
def test_ranks_share_what_one_process_would_see(n_samples, batch_size, world, drop_last, seed):
    together = batch_size * world
    if drop_last and n_samples < together:
        return
    alone = list(EpochBatchSampler(n_samples, together, seed, drop_last=drop_last))
    ranks = [
        list(EpochBatchSampler(n_samples, batch_size, seed, True, drop_last, rank, world))
        for rank in range(world)
    ]
    assert len({len(dealt) for dealt in ranks}) == 1
    for step, batch in enumerate(alone):
        shares = [dealt[step] for dealt in ranks]
        assert len({len(share) for share in shares}) == 1
        joined = list(chain(*shares))
        assert joined[: len(batch)] == batch
        assert len(joined) - len(batch) < world


def test_lightning_sets_the_epoch_through_a_loader():
    sampler = EpochBatchSampler(20, 4, seed=3)
    loader = DataLoader(range(20), batch_sampler=sampler)  # pyright: ignore[reportArgumentType]
    _set_sampler_epoch(loader, 5)
    assert sampler.epoch == 5
    assert torch.cat(list(loader)).tolist() == sampler.order(5).tolist()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"n_samples": 0, "batch_size": 2}, "n_samples is 0"),
        ({"n_samples": 3, "batch_size": 0}, "batch_size 0"),
        ({"n_samples": 3, "batch_size": 4, "drop_last": True}, "make batch_size smaller"),
        ({"n_samples": 3, "batch_size": 1, "rank": 2, "world_size": 2}, "rank 2"),
        ({"n_samples": 3, "batch_size": 1, "seed": -1}, "seed is -1"),
    ],
)
def test_impossible_arguments_are_named(arguments, what):
    with pytest.raises(ValueError, match=what):
        EpochBatchSampler(**arguments)


def test_resuming_beyond_the_epoch_is_an_error():
    with pytest.raises(ValueError, match="an epoch has 5 batches"):
        EpochBatchSampler(10, 2).resume_at(0, 6)
