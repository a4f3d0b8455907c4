"""Ids to global batches of rows of similar length, in an order that depends on seed and epoch alone."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sst2_xlmr.config import Config
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.model.tokenizer import window_starts
from sst2_xlmr.util.distributed import World

BATCHES_PER_GROUP = 100


class MicroBatch(NamedTuple):
    """A micro-batch: rows of one rank's part of a global batch that go through the model together."""

    ids: Tensor  # int64 [tokens], the concatenated rows
    lengths: Tensor  # int64 [rows] or [windows], tokens per row or per window; stays on the CPU
    labels: Tensor  # [rows, ...], of the task's dtype and shape
    # int64 [rows] or [windows], below 2**32: seeds for an engine's dropout masks, from seed, epoch and row alone
    dropout_keys: Tensor
    global_rows: int  # of the global batch, over all ranks
    factor: float = 1.0  # on loss and counts: 0.0 for a filler batch, which only keeps ranks in step
    row_weights: Tensor | None = None  # fp32 [rows], factors on the rows' losses; None for ones
    global_weight: float = 0.0  # sum of the row weights over the global batch
    windows: Tensor | None = None  # int64 [rows], windows per row; None for one each; stays on the CPU

    def to(self, device: torch.device) -> "MicroBatch":
        ids, labels = (tensor.to(device, non_blocking=True) for tensor in (self.ids, self.labels))
        weights = None if self.row_weights is None else self.row_weights.to(device, non_blocking=True)
        return self._replace(ids=ids, labels=labels, row_weights=weights)


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Hash uint64 numbers with two rounds of splitmix64 (https://prng.di.unimi.it/splitmix64.c)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values


def dropout_keys(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return int64 [rows], pseudorandom numbers below 2**32."""
    start = (seed * 0x9E3779B97F4A7C15 + (epoch << 40)) % 2**64  # NumPy warns of overflow in a scalar, not in arrays
    return (splitmix64(rows.astype(np.uint64) + np.uint64(start)) >> np.uint64(32)).astype(np.int64)


def select_rows(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the rows' ids, int64 [tokens], and their lengths, int64 [rows]; other arguments as in `TokenCache`."""
    lengths = lengths[rows].astype(np.int64)
    chosen = [ids[start : start + length] for start, length in zip(starts[rows].tolist(), lengths.tolist())]
    return torch.from_numpy(np.concatenate(chosen).astype(np.int64)), torch.from_numpy(lengths)


def split_windows(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return tokens per window, int64 [windows], and windows per row, int64 [rows], or None for one each."""
    is_start = torch.from_numpy(window_starts(ids.numpy()))
    starts = is_start.nonzero()[:, 0]
    if len(starts) <= len(lengths):
        return lengths, None
    windows = torch.tensor([int(part.sum()) for part in is_start.split(lengths.tolist())])
    return starts.diff(append=torch.tensor([len(ids)])), windows


def rows_in_training_order(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, first: int = 0
) -> Iterator[np.ndarray]:
    """Yield the global batches of an epoch, from batch `first` on, each an array of row indices.

    The rows are shuffled and divided into groups of 100 batches; each group is sorted by length and divided into
    batches, and the batches are shuffled: little padding, but successive batches of random length. A group is sorted
    when its first batch is needed, to start at once. NumPy guarantees the numbers of `RandomState` forever (NEP 19).
    """
    random = np.random.RandomState([seed, epoch])
    order = random.permutation(len(lengths))
    group_size = batch_size * BATCHES_PER_GROUP
    is_sorted = np.zeros(-(-len(order) // group_size), bool)
    for batch in random.permutation(-(-len(order) // batch_size))[first:]:
        group = batch // BATCHES_PER_GROUP
        if not is_sorted[group]:
            rows = order[group * group_size : (group + 1) * group_size]
            rows[:] = rows[np.argsort(lengths[rows], kind="stable")]
            is_sorted[group] = True
        yield order[batch * batch_size : (batch + 1) * batch_size]


class BatchLoader:
    """This rank's part of the global batches, epoch after epoch, starting at any (epoch, batch).

    That position is enough to resume with any number of ranks. Rank r of W takes rows r::W of a global batch.
    """

    def __init__(self, cache: TokenCache, config: Config, world: World) -> None:
        self.cache, self.config, self.world = cache, config, world
        # int64 [rows], windows per row
        self.windows = cache.windows() if config.long_texts == "windows" else np.broadcast_to(1, len(cache))

    def global_batches(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        """Yield the row indices of an epoch's global batches, over all ranks, from batch `first` on."""
        return rows_in_training_order(self.cache.lengths, self.config.batch_size, self.config.seed, epoch, first)

    def starting_at(self, epoch: int, batch: int) -> Iterator[list[MicroBatch]]:
        """Yield this rank's micro-batches of each global batch, endlessly, from `batch` of `epoch` on."""
        while True:
            for rows in self.global_batches(epoch, batch):
                yield self.micro_batches(epoch, rows)
            epoch, batch = epoch + 1, 0

    def micro_batches(self, epoch: int, rows: np.ndarray) -> list[MicroBatch]:
        """Return this rank's micro-batches of a global batch, as many as the other ranks'."""
        world = self.world
        cuts = [self._split(rows[rank :: world.world_size]) for rank in range(world.world_size)]
        mine = cuts[world.rank] + [rows[:0]] * (max(map(len, cuts)) - len(cuts[world.rank]))
        return [self._batch(cut if len(cut) else rows[:1], epoch, rows, float(len(cut) > 0)) for cut in mine]

    def _split(self, rows: np.ndarray) -> list[np.ndarray]:
        """Split a rank's rows into parts of at most --micro-batch-size rows, or windows; a row stays whole."""
        size = self.config.micro_batch_size or 2**62
        starts, total = [], 0
        for position, count in enumerate(self.windows[rows].tolist()):
            if total and total + count > size:
                starts.append(position)
                total = 0
            total += count
        return np.split(rows, starts)

    def _batch(self, rows: np.ndarray, epoch: int, global_rows: np.ndarray, factor: float) -> MicroBatch:
        ids, lengths = select_rows(self.cache.ids, self.cache.starts, self.cache.lengths, rows)
        labels = torch.from_numpy(self.cache.labels[rows])
        keys = torch.from_numpy(dropout_keys(rows, self.config.seed, epoch))
        lengths, windows = split_windows(ids, lengths)
        if windows is not None:  # a row's first window has the row's key, as if it had no other windows
            positions = torch.cat([torch.arange(count) for count in windows.tolist()])
            keys = (keys.repeat_interleave(windows) + positions * 0x9E3779B9) % 2**32
        row_weights, total = None, float(len(global_rows))
        if (weights := self.cache.weights) is not None:
            row_weights, total = torch.from_numpy(weights[rows]), float(weights[global_rows].sum(dtype=np.float64))
        return MicroBatch(ids, lengths, labels, keys, len(global_rows), factor, row_weights, total, windows)
