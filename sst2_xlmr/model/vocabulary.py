"""The vocabulary: which rows of the embedding table a run trains, and how to expand them to the whole table.

XLM-R has 250,002 rows, but a run's files use few of them (SST-2: 8,890). A row that no batch contains has no gradient,
so its Adam moments stay zero and it only decays, by the product of `1 - lr * weight_decay` over all steps, which is
applied when the table is expanded. Used rows get the same bits as in a whole table (given the same clipping factor);
the other rows are rounded once instead of at every step.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sst2_xlmr.model.weights import Tensors
from sst2_xlmr.util.tensors import LazyTensor, TensorLike

EMBEDDING = "encoder.tokens.weight"
SPECIAL_IDS = 4  # <s>, <pad>, </s>, <unk>: always kept, so their rows are their ids


@dataclass
class Vocabulary:
    """The ids whose embedding rows a run trains."""

    ids: Tensor  # int64 [rows], ascending, the id of each row
    size: int  # of the whole vocabulary
    scaled_weight_decay: float = 0.0  # the table's, times its factor on the learning rate; 0 if it is frozen
    unused_rows_factor: float = 1.0  # product of (1 - lr * weight decay) over all steps, for rows without any gradient

    def decay_unused_rows(self, lr: float) -> None:
        """Update `unused_rows_factor` for an optimizer step; `lr` is the learning rate before layer-wise decay."""
        self.unused_rows_factor *= 1 - lr * self.scaled_weight_decay

    def id_map(self) -> Tensor:
        """Return int32 [size], the row of each id, `<unk>`'s if it has none."""
        rows = torch.full((self.size,), 3, dtype=torch.int32)
        rows[self.ids] = torch.arange(len(self.ids), dtype=torch.int32)
        return rows

    def expand(self, pretrained: LazyTensor, trained: TensorLike) -> LazyTensor:
        """Return the whole table, fp32 [size, hidden], as training all rows would; `trained` is [rows, hidden]."""

        def make(start: int, stop: int) -> Tensor:
            table = pretrained[start:stop] * self.unused_rows_factor
            first, last = torch.searchsorted(self.ids, torch.tensor([start, stop])).tolist()
            table[self.ids[first:last] - start] = trained[first:last].cpu()
            return table

        return LazyTensor(pretrained.shape, pretrained.dtype, make)

    def adapt_checkpoint(self, weights: Tensors, moments: Tensors, ids: Tensor, start: Tensor) -> None:
        """Convert a checkpoint's table and moments to this vocabulary, in place: other test files may use other ids.

        `ids`, int64, are the ids of the checkpoint's rows; `start`, fp32 [rows, hidden], is the table before training.
        """
        if torch.equal(ids, self.ids):
            return
        for tensors, prefix in ((weights, ""), (moments, "exp_avg."), (moments, "exp_avg_sq.")):
            if (name := prefix + EMBEDDING) in tensors:
                rows = start.cpu() * self.unused_rows_factor if tensors is weights else torch.zeros(start.shape)
                rows[torch.isin(self.ids, ids)] = tensors[name][torch.isin(ids, self.ids)]
                tensors[name] = rows


def used_vocabulary(id_arrays: Iterable[np.ndarray], size: int) -> Vocabulary:
    """Return the vocabulary of the special ids and of all ids in the integer arrays."""
    ids = np.unique(np.concatenate([np.arange(SPECIAL_IDS), *id_arrays]))
    return Vocabulary(torch.from_numpy(ids), size)
