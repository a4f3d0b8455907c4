"""Global batches, position."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from conftest import CPU

from sst2_xlmr.config import Config
from sst2_xlmr.data.batches import Batch, BatchLoader, dropout_keys, rows_in_training_order, select_rows
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.util.distributed import World

LENGTHS = np.random.RandomState(0).randint(3, 60, 1003)


def world_of(rank: int, world_size: int) -> World:
    return World(rank, world_size, rank, world_size, CPU)


def whole_order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The order as it is defined, made all at once."""
    random = np.random.RandomState([seed, epoch])
    order = random.permutation(len(lengths))
    group = batch_size * 100
    batches = []
    for start in range(0, len(order), group):
        rows = order[start : start + group]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (800, 4), (1003, 4), (1003, 1), (1003, 7), (1003, 2000)])
@pytest.mark.parametrize("first", [0, 1, 37, 250])
def test_order_is_the_defined_one_from_any_position_on(rows: int, batch_size: int, first: int) -> None:
    for seed, epoch in ((0, 0), (5, 3)):
        expected = whole_order(LENGTHS[:rows], batch_size, seed, epoch)[first:]
        found = list(rows_in_training_order(LENGTHS[:rows], batch_size, seed, epoch, first))
        assert [batch.tolist() for batch in found] == [batch.tolist() for batch in expected]


@pytest.mark.parametrize("micro_batch_size", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 20])
def test_ranks_share_every_global_batch(cache: TokenCache, world_size: int, micro_batch_size: int) -> None:
    """Row i of a batch belongs to rank i % W; all ranks have as many micro-batches, some perhaps without weight."""
    config = Config(batch_size=16, seed=5, micro_batch_size=micro_batch_size)
    worlds = [world_of(rank, world_size) for rank in range(world_size)]
    loaders = [BatchLoader(cache, cache.lengths(), None, config, world) for world in worlds]
    for rows in (np.arange(40, 56), np.arange(7, 8), np.array([9, 3, 5, 11, 2])):
        ranks = [loader[2, rows] for loader in loaders]
        size = micro_batch_size or 99
        assert {len(rank) for rank in ranks} == {-(-len(rows[::world_size]) // size)}, "no more than are needed"
        for number, rank in enumerate(ranks):
            real = [batch for batch in rank if batch.weight]
            mine = rows[number::world_size]
            assert all(batch.global_rows == len(rows) and len(batch.lengths) > 0 for batch in rank)
            assert all(len(batch.lengths) <= size for batch in rank)
            if len(mine):
                check_batches(real, cache, mine, 5, 2)
            else:
                assert not real


def check_batches(batches: list[Batch], cache: TokenCache, rows: np.ndarray, seed: int, epoch: int) -> None:
    ids, lengths = select_rows(cache.ids, cache.offsets, rows)
    expected = (ids, lengths, torch.from_numpy(cache.labels[rows]), torch.from_numpy(dropout_keys(rows, seed, epoch)))
    for part, whole in zip(zip(*(batch[:4] for batch in batches)), expected):
        assert torch.cat(part).tolist() == whole.tolist()
    for batch in batches:
        assert len(batch.ids) == int(batch.lengths.sum())


def test_only_some_rows_of_the_file_are_trained_on_and_keep_their_numbers(cache: TokenCache) -> None:
    rows = np.arange(3, 1003, 2)
    loader = BatchLoader(cache, LENGTHS[rows], rows, Config(batch_size=8), world_of(0, 1))
    whole, rest = ([batch.tolist() for batch in loader.global_batches(2, first)] for first in (0, 50))
    assert sorted(itertools.chain(*whole)) == rows.tolist()
    assert rest == whole[50:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_goes_on_into_the_next_epoch_and_draws_nothing(cache: TokenCache, num_workers: int) -> None:
    config = Config(batch_size=30, micro_batch_size=8, num_workers=num_workers, seed=5)
    loader = BatchLoader(cache, cache.lengths(), None, config, world_of(1, 2))
    state = torch.get_rng_state()
    served = list(itertools.islice(loader.starting_at(0, len(loader) - 2), 5))
    assert torch.equal(torch.get_rng_state(), state)
    places = [(0, len(loader) - 2), (0, len(loader) - 1), (1, 0), (1, 1), (1, 2)]
    for batches, (epoch, batch) in zip(served, places):
        check_batches(batches, cache, next(loader.global_batches(epoch, batch))[1::2], 5, epoch)


def test_dropout_keys_belong_to_seed_epoch_and_row() -> None:
    """All different, the same whatever else is in the batch, and no warning of an overflow for any seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        places = itertools.product((0, 1, 2**32 - 1), (0, 9))
        keys = {(seed, epoch): dropout_keys(np.arange(1000), seed, epoch) for seed, epoch in places}
    assert len(np.unique(np.concatenate(list(keys.values())))) == 6000
    for (seed, epoch), found in keys.items():
        assert found.min() >= 0 and found.max() < 2**32
        some = np.array([700, 3, 41])
        np.testing.assert_array_equal(dropout_keys(some, seed, epoch), found[some])
