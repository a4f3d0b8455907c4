"""Length-grouped global batches, position in the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from sst2_xlmr.config import Config
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.model.tokenizer import PAD_ID

BATCHES_PER_GROUP = 100


class Batch(NamedTuple):
    """Rows that go through the model together.

    Attributes:
        tokens: int64 [rows, length], padded with 1 at the right to the longest of these rows.
        labels: int64 [rows].
        keys: int64 [rows], a random number below 2**32 for every row, from seed, epoch and row: dropout on a CPU draws
            from it, so that masks are the same however a batch is cut.
        padded: whether any row is shorter than the others, i.e. a mask is needed.
        real_tokens: how many tokens are not padding.
        weight: 1.0, or 0.0 where a rank without a row of its own computes one in order to keep step with the others.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    keys: torch.Tensor
    padded: bool
    real_tokens: int
    weight: float = 1.0

    def to(self, device: torch.device) -> Batch:
        return self._replace(
            tokens=self.tokens.to(device, non_blocking=True), labels=self.labels.to(device, non_blocking=True)
        )


class RankShare(NamedTuple):
    """One rank's part of a global batch.

    Attributes:
        micro_batches: its rows, cut to the micro-batch size.
        global_rows: how many rows all ranks have together.
        accumulates: whether any rank has more than one micro-batch.
    """

    micro_batches: list[Batch]
    global_rows: int
    accumulates: bool


class ShareRows(NamedTuple):
    """What the sampler asks the dataset for: row numbers, and the facts that do not follow from them."""

    rows: np.ndarray
    keys: np.ndarray
    global_rows: int
    largest_share: int
    weight: float


def dropout_keys(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return int64 [rows], numbers below 2**32 that look random (splitmix64, https://prng.di.unimi.it/splitmix64.c)."""
    start = (seed * 0x9E3779B97F4A7C15 + (epoch << 40)) % 2**64  # NumPy warns of overflow in a scalar, not in arrays
    values = rows.astype(np.uint64) + np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return (values >> np.uint64(32)).astype(np.int64)


def collate(cache: TokenCache, rows: np.ndarray, keys: np.ndarray | None = None, weight: float = 1.0) -> Batch:
    """Pad the given rows of the cache to the longest of them; without keys, these are zeros."""
    spans = [(cache.offsets[row], cache.offsets[row + 1]) for row in rows]
    lengths = [int(end - start) for start, end in spans]
    tokens = np.full((len(rows), max(lengths)), PAD_ID, np.int64)
    for line, (start, end) in zip(tokens, spans):
        line[: end - start] = cache.ids[start:end]
    if cache.renumbering is not None:
        tokens = cache.renumbering[tokens].astype(np.int64)
    labels = cache.labels[rows].astype(np.int64)
    keys = np.zeros(len(rows), np.int64) if keys is None else keys
    tensors = [torch.from_numpy(array) for array in (tokens, labels, keys)]
    return Batch(tensors[0], tensors[1], tensors[2], min(lengths) < max(lengths), sum(lengths), weight)


def rows_in_training_order(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, first: int = 0
) -> Iterator[np.ndarray]:
    """Yield the global batches of an epoch from number `first` on, each an array of row numbers.

    Their order is a function of the other arguments alone. The rows are permuted, cut into groups of 100 batches, each
    group sorted by length and cut into batches, and the batches permuted: neighbours in length share a batch, so there
    is little padding, and batches of all lengths mix. A group is sorted when the first of its batches is wanted, so
    that a large file does not keep the first step waiting. `RandomState` is used because NumPy guarantees its numbers
    for ever (NEP 19).
    """
    random = np.random.RandomState([seed, epoch])
    order = np.arange(len(lengths), dtype=np.int32 if len(lengths) < 2**31 else np.int64)
    random.shuffle(order)
    group_size = batch_size * BATCHES_PER_GROUP
    is_sorted = np.zeros(-(-len(order) // group_size), bool)
    for batch in random.permutation(-(-len(order) // batch_size))[first:]:
        group = batch // BATCHES_PER_GROUP
        if not is_sorted[group]:
            rows = order[group * group_size : (group + 1) * group_size]
            rows[:] = rows[np.argsort(lengths[rows], kind="stable")]
            is_sorted[group] = True
        yield order[batch * batch_size : (batch + 1) * batch_size]


class GlobalBatchSampler:
    """Yields this rank's share of every global batch of the current epoch, from the current position on.

    Its whole state is the position (epoch, batches consumed), which any number of ranks can resume from. The training
    loop moves it with `load_state_dict`; what a loader has fetched ahead does not count as consumed.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        """Return the number of global batches in a whole epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def global_batches(self, first: int) -> Iterator[np.ndarray]:
        """Yield the row numbers of the epoch's global batches, of all ranks together, from number `first` on."""
        return rows_in_training_order(self.lengths, self.batch_size, self.seed, self.epoch, first)

    def __iter__(self) -> Iterator[ShareRows]:
        for rows in self.global_batches(self.batch):
            share = rows[self.rank :: self.world_size]
            largest_share = -(-len(rows) // self.world_size)
            weight = 1.0 if len(share) else 0.0
            share = share if len(share) else rows[:1]
            keys = dropout_keys(share, self.seed, self.epoch)
            yield ShareRows(share, keys, len(rows), largest_share, weight)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


class ShareDataset:
    """Turns the sampler's row numbers into tensors; the loader calls `__getitems__` with a whole share at once."""

    def __init__(self, cache: TokenCache, micro_batch_size: int) -> None:
        self.cache, self.micro_batch_size = cache, micro_batch_size

    def __len__(self) -> int:
        return len(self.cache)

    def __getitems__(self, share: ShareRows) -> RankShare:
        size = self.micro_batch_size or len(share.rows)
        cuts = [slice(i, i + size) for i in range(0, len(share.rows), size)]
        micro_batches = [collate(self.cache, share.rows[cut], share.keys[cut], share.weight) for cut in cuts]
        accumulates = self.micro_batch_size > 0 and share.largest_share > self.micro_batch_size
        return RankShare(micro_batches, share.global_rows, accumulates)


def _as_it_is(share: RankShare) -> RankShare:
    return share


def build_loader(
    cache: TokenCache, sampler: GlobalBatchSampler, config: Config, pin_memory: bool
) -> StatefulDataLoader:
    """Return the loader that yields a `RankShare` per global batch, in the sampler's order."""
    return StatefulDataLoader(
        ShareDataset(cache, config.micro_batch_size),
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=config.num_workers,
        pin_memory=pin_memory,
        # A loader draws a seed at every start; taken from torch's global generator, that draw would change dropout
        # after a resume.
        generator=torch.Generator(),
    )
