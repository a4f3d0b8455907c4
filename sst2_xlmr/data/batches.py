"""Ids to global batches of similar length, in an order that is a function of seed and epoch alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from sst2_xlmr.config import Config
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.model.roberta import PAD_ID
from sst2_xlmr.util.distributed import World

BATCHES_PER_GROUP = 100

# torchdata's newest release warns of what it calls itself.
warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)


class Batch(NamedTuple):
    """Rows that go through the model together.

    Attributes:
        tokens: int64 [rows, length], padded with 1 at the right to the longest of these rows.
        labels: int64 [rows].
        keys: int64 [rows], a random number below 2**32 for every row, from seed, epoch and row: an engine that draws
            dropout masks from it has the same masks however a batch is cut.
        padded: whether any row is shorter than the others, i.e. a mask is needed.
        real_tokens: how many tokens are not padding.
        weight: 1.0, or 0.0 if a rank that has no row left computes one only to keep step with the others.
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


class RankBatch(NamedTuple):
    """One rank's part of a global batch.

    Attributes:
        micro_batches: its rows, cut to the micro-batch size.
        global_rows: how many rows all ranks have together.
        accumulates: whether any rank has more than one micro-batch.
    """

    micro_batches: list[Batch]
    global_rows: int
    accumulates: bool

    @property
    def rows(self) -> float:
        """Rows of this rank's own."""
        return sum(len(batch.labels) * batch.weight for batch in self.micro_batches)

    @property
    def real_tokens(self) -> float:
        """Tokens of this rank's own rows, padding excluded."""
        return sum(batch.real_tokens * batch.weight for batch in self.micro_batches)


class RankRows(NamedTuple):
    """What the sampler asks the dataset for: one rank's row numbers, and what cannot be derived from them."""

    rows: np.ndarray
    keys: np.ndarray
    global_rows: int
    most_rows: int  # of any rank
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
    forever (NEP 19).
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
    """Yields this rank's rows of every global batch of the current epoch, from the current position on.

    Its whole state is the position (epoch, batches consumed), from which any number of ranks can go on. What a loader
    has fetched ahead does not count as consumed.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, seed: int, world: World, rows: np.ndarray | None = None
    ) -> None:
        """Batch some rows of a file.

        Args:
            lengths: int [rows], tokens per row.
            rows: int [rows], their numbers in the file; None if they are all of its rows.
        """
        self.lengths, self.rows, self.batch_size, self.seed = lengths, rows, batch_size, seed
        self.rank, self.world_size = world.rank, world.world_size
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        """Return the number of global batches in a whole epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def global_batches(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        """Yield the row numbers of an epoch's global batches, of all ranks together, from number `first` on."""
        batches = rows_in_training_order(self.lengths, self.batch_size, self.seed, epoch, first)
        return batches if self.rows is None else (self.rows[batch] for batch in batches)

    def __iter__(self) -> Iterator[RankRows]:
        for rows in self.global_batches(self.epoch, self.batch):
            rank_rows = rows[self.rank :: self.world_size]
            most_rows = -(-len(rows) // self.world_size)
            weight = 1.0 if len(rank_rows) else 0.0
            rank_rows = rank_rows if len(rank_rows) else rows[:1]
            keys = dropout_keys(rank_rows, self.seed, self.epoch)
            yield RankRows(rank_rows, keys, len(rows), most_rows, weight)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


class RankBatchDataset:
    """Turns the sampler's row numbers into tensors; the loader calls `__getitems__` for a whole batch at once."""

    def __init__(self, cache: TokenCache, micro_batch_size: int) -> None:
        self.cache, self.micro_batch_size = cache, micro_batch_size

    def __len__(self) -> int:
        return len(self.cache)

    def __getitems__(self, wanted: RankRows) -> RankBatch:
        size = self.micro_batch_size or len(wanted.rows)
        cuts = [slice(i, i + size) for i in range(0, len(wanted.rows), size)]
        micro_batches = [collate(self.cache, wanted.rows[cut], wanted.keys[cut], wanted.weight) for cut in cuts]
        accumulates = self.micro_batch_size > 0 and wanted.most_rows > self.micro_batch_size
        return RankBatch(micro_batches, wanted.global_rows, accumulates)


def _unchanged(rank_batch: RankBatch) -> RankBatch:
    return rank_batch


class BatchLoader:
    """This rank's part of the global batches, epoch after epoch, from any position on."""

    def __init__(self, cache: TokenCache, sampler: GlobalBatchSampler, config: Config, device: torch.device) -> None:
        self.sampler = sampler
        self._loader = StatefulDataLoader(
            RankBatchDataset(cache, config.micro_batch_size),
            batch_sampler=sampler,
            collate_fn=_unchanged,
            num_workers=config.num_workers,
            pin_memory=device.type == "cuda",
            # A loader draws a seed at every start; taken from torch's global generator, that draw would change dropout
            # after a resume.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Return the number of global batches in an epoch."""
        return len(self.sampler)

    def starting_at(self, epoch: int, batch: int) -> Iterator[RankBatch]:
        """Yield batches without end, from number `batch` of an epoch on; no batch before it is read."""
        while True:
            self.sampler.load_state_dict({"epoch": epoch, "batch": batch})
            yield from self._loader
            epoch, batch = epoch + 1, 0

    def rows_at(self, epoch: int, batch: int) -> np.ndarray:
        """Return the row numbers, from 0, of one global batch of all ranks."""
        return next(self.sampler.global_batches(epoch, batch))
