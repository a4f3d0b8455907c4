"""The vocabulary: which rows of the embedding table a run trains, and how the whole table is made of them again.

XLM-R has 250,002 rows, of which a run's files use few (SST-2: 8,890). A row that no batch contains has no gradient, so
its Adam moments stay zero and it only decays, by the product of all `1 - lr * weight_decay`; that one number is kept
and applied when the table is expanded. Used rows get the same bits as in a whole table (given the same clipping
factor); untouched ones are rounded once instead of at every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from sst2_xlmr.util.tensors import LazyTensor, TensorLike

EMBEDDING = "encoder.tokens.weight"
SPECIAL_IDS = 4  # <s>, <pad>, </s>, <unk> keep their places
_CHUNK = 1 << 22


@dataclass
class Vocabulary:
    """The rows of an embedding table."""

    ids: torch.Tensor  # int64 [rows], ascending, the id of every row
    size: int  # of the whole vocabulary
    decay_rate: float = 0.0  # weight decay of the table, times its factor on the learning rate; 0 if it is frozen
    decay: float = 1.0  # what all steps so far have left of a row without gradient

    @property
    def is_whole(self) -> bool:
        return len(self.ids) == self.size

    def count_step(self, lr: float) -> None:
        """Count an optimizer step at this learning rate, before layer-wise decay."""
        self.decay *= 1 - lr * self.decay_rate

    def id_map(self) -> torch.Tensor | None:
        """Return int32 [size], each id's row; ids without one become `<unk>`. None for the whole vocabulary."""
        if self.is_whole:
            return None
        rows = torch.full((self.size,), 3, dtype=torch.int32)
        rows[self.ids] = torch.arange(len(self.ids), dtype=torch.int32)
        return rows

    def expand(self, pretrained: LazyTensor, trained: TensorLike) -> LazyTensor:
        """Return the whole table, fp32 [size, hidden], as if it had been trained whole; `trained` is [rows, hidden]."""

        def make(start: int, stop: int) -> torch.Tensor:
            table = pretrained[start:stop] * self.decay
            first, last = torch.searchsorted(self.ids, torch.tensor([start, stop])).tolist()
            table[self.ids[first:last] - start] = trained[first:last].cpu()
            return table

        return LazyTensor(pretrained.shape, pretrained.dtype, make)

    def take_over(
        self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], ids: torch.Tensor, start: torch.Tensor
    ) -> None:
        """Give a checkpoint's table and moments this vocabulary's rows, in place: other test files may use other ids.

        `ids`, int64, are those of the checkpoint's rows; `start`, fp32 [rows, hidden], is the table before training.
        """
        if torch.equal(ids, self.ids):
            return
        names = (EMBEDDING, f"exp_avg.{EMBEDDING}", f"exp_avg_sq.{EMBEDDING}")
        for tensors, name in zip((weights, moments, moments), names):
            if name in tensors:
                rows = start.cpu() * self.decay if tensors is weights else torch.zeros_like(start, device="cpu")
                rows[torch.isin(self.ids, ids)] = tensors[name][torch.isin(ids, self.ids)]
                tensors[name] = rows


def whole_vocabulary(size: int) -> Vocabulary:
    return Vocabulary(torch.arange(size), size)


def used_vocabulary(id_arrays: Iterable[np.ndarray], size: int) -> Vocabulary:
    """Return the vocabulary of the special ids and of all that occur in the arrays of integers."""
    used = np.zeros(size, bool)
    used[:SPECIAL_IDS] = True
    for ids in id_arrays:
        for start in range(0, len(ids), _CHUNK):  # ids may be a memory map larger than memory
            used[ids[start : start + _CHUNK]] = True
    return Vocabulary(torch.from_numpy(np.flatnonzero(used)), size)
