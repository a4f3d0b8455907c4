"""Global batches, position."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SAMPLE_DATA

from sst2_xlmr.config import Config
from sst2_xlmr.data.batches import BatchLoader, GlobalBatchSampler, dropout_keys, rows_in_training_order
from sst2_xlmr.data.rows import SST2_NAMES, Columns
from sst2_xlmr.data.token_cache import TokenCache, tokenize_file
from sst2_xlmr.util.distributed import World

LENGTHS = np.random.RandomState(0).randint(3, 60, 1003)


def world_of(rank: int, world_size: int) -> World:
    return World(rank, world_size, rank, world_size, torch.device("cpu"))


def loader_of(cache: TokenCache, config: Config, world: World) -> BatchLoader:
    sampler = GlobalBatchSampler(cache.lengths(), config.batch_size, config.seed, world)
    return BatchLoader(cache, sampler, config, world.device)


@pytest.fixture
def cache(tiny_encoder: Path, tmp_path: Path) -> TokenCache:
    tokenizer_file = tiny_encoder / "sentencepiece.bpe.model"
    return tokenize_file(SAMPLE_DATA / "train.tsv", tokenizer_file, Columns(), SST2_NAMES, 20, tmp_path / "cache")


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


def test_the_first_batch_sorts_one_group_only() -> None:
    class Lengths(np.ndarray):
        asked = 0

        def __getitem__(self, rows: Any) -> Any:
            Lengths.asked += len(rows)
            return super().__getitem__(rows)

    next(rows_in_training_order(LENGTHS.view(Lengths), 2, 0, 0))
    assert Lengths.asked <= 200


def test_every_row_once_an_epoch_and_one_smaller_batch() -> None:
    batches = list(rows_in_training_order(LENGTHS, 8, seed=3, epoch=0))
    assert sorted(np.concatenate(batches)) == list(range(1003))
    assert sorted(len(batch) for batch in batches) == [3] + [8] * 125


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(list(rows_in_training_order(LENGTHS, 8, seed, epoch))).tolist()

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1) != order(4, 1)


def test_batches_hold_rows_of_like_length() -> None:
    batches = list(rows_in_training_order(LENGTHS, 8, seed=0, epoch=0))
    padded = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
    assert padded < 1.1 * LENGTHS.sum()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_every_global_batch(world_size: int) -> None:
    expected = rows_in_training_order(LENGTHS, 8, seed=0, epoch=0)
    ranks = [list(GlobalBatchSampler(LENGTHS, 8, 0, world_of(rank, world_size))) for rank in range(world_size)]
    for number, batch in enumerate(expected):
        parts = [rank[number] for rank in ranks]
        real = [part.rows for part in parts if part.weight]
        assert sorted(np.concatenate(real)) == sorted(batch)
        assert all(len(part.rows) >= 1 and part.global_rows == len(batch) for part in parts)


def test_position_is_epoch_and_batch() -> None:
    sampler = GlobalBatchSampler(LENGTHS, 8, 0, world_of(0, 1))
    sampler.load_state_dict({"epoch": 2, "batch": 0})
    whole = [wanted.rows.tolist() for wanted in sampler]
    sampler.load_state_dict({"epoch": 2, "batch": 100})
    assert [wanted.rows.tolist() for wanted in sampler] == whole[100:]
    assert sampler.state_dict() == {"epoch": 2, "batch": 100}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_serves_the_sampler_without_touching_the_global_generator(cache: TokenCache, num_workers: int) -> None:
    config = Config(batch_size=30, micro_batch_size=8, num_workers=num_workers)
    loader = loader_of(cache, config, world_of(1, 2))
    sampler = GlobalBatchSampler(cache.lengths(), 30, 0, world_of(1, 2))
    sampler.load_state_dict({"epoch": 1, "batch": 5})
    state = torch.get_rng_state()
    rank_batches = list(itertools.islice(loader.starting_at(1, 5), len(loader) - 5))
    assert torch.equal(torch.get_rng_state(), state)
    for rank_batch, wanted in zip(rank_batches, sampler):
        assert [len(batch.labels) for batch in rank_batch.micro_batches][:1] == [min(8, len(wanted.rows))]
        assert rank_batch.accumulates == (wanted.most_rows > 8)
        assert rank_batch.rows == len(wanted.rows)
        labels = torch.cat([batch.labels for batch in rank_batch.micro_batches])
        assert labels.tolist() == cache.labels[wanted.rows].tolist()
        for batch in rank_batch.micro_batches:
            assert batch.padded == bool((batch.tokens == 1).any())
            assert batch.real_tokens == int((batch.tokens != 1).sum())


def test_dropout_keys_belong_to_seed_epoch_and_row() -> None:
    """All different, the same whatever else is in the batch, and no warning of an overflow for any seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keys = {
            (seed, epoch): dropout_keys(np.arange(1000), seed, epoch) for seed in (0, 1, 2**32 - 1) for epoch in (0, 9)
        }
    assert len(np.unique(np.concatenate(list(keys.values())))) == 6000
    for (seed, epoch), found in keys.items():
        assert found.min() >= 0 and found.max() < 2**32
        some = np.array([700, 3, 41])
        np.testing.assert_array_equal(dropout_keys(some, seed, epoch), found[some])


@pytest.mark.parametrize("world_size", [1, 3])
def test_micro_batches_carry_the_keys_of_their_rows(cache: TokenCache, world_size: int) -> None:
    for rank in range(world_size):
        config, world = Config(batch_size=16, seed=5, micro_batch_size=3), world_of(rank, world_size)
        sampler = GlobalBatchSampler(cache.lengths(), 16, 5, world)
        sampler.load_state_dict({"epoch": 2, "batch": 0})
        for wanted, batch in zip(sampler, loader_of(cache, config, world).starting_at(2, 0)):
            keys = torch.cat([micro_batch.keys for micro_batch in batch.micro_batches])
            np.testing.assert_array_equal(keys, dropout_keys(wanted.rows, 5, 2))


def test_loader_goes_on_into_the_next_epoch(cache: TokenCache) -> None:
    loader = loader_of(cache, Config(batch_size=30), world_of(0, 1))
    served = list(itertools.islice(loader.starting_at(0, len(loader) - 2), 5))
    expected = [
        loader.rows_at(epoch, batch)
        for epoch, batch in ((0, len(loader) - 2), (0, len(loader) - 1), (1, 0), (1, 1), (1, 2))
    ]
    for rank_batch, rows in zip(served, expected):
        assert rank_batch.micro_batches[0].labels.tolist() == cache.labels[rows].tolist()
