"""Train only the embedding rows that the run's own files use, and expand the table again.

SST-2 uses 9,370 of XLM-R's 250,002 rows. A row that no batch contains has no gradient, so its Adam moments stay zero
and it only decays, by the product of all `1 - lr * weight_decay`; that one number is kept and applied when the table is
expanded. flair's `transformer-smaller-training-vocab` (https://github.com/helpmefindaname/transformer-smaller-training-vocab)
shrinks and restores the table around a Trainer run too, but leaves out the decay of untouched rows. Used rows get
the same bits as in a whole table (given the same clipping factor); untouched ones are rounded once instead of at every
step.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from sst2_xlmr.util.files import Deferred

TABLE_NAME = "encoder.transformer.token_embedding.weight"
SPECIAL_IDS = 4  # <s>, <pad>, </s>, <unk> keep their places
_CHUNK = 1 << 22


def used_ids(id_arrays: Iterable[np.ndarray], vocab_size: int) -> np.ndarray:
    """Return int64 [rows], ascending: the special ids and every id that occurs."""
    used = np.zeros(vocab_size, bool)
    used[:SPECIAL_IDS] = True
    for ids in id_arrays:
        for start in range(0, len(ids), _CHUNK):  # ids may be a memory map larger than memory
            used[ids[start : start + _CHUNK]] = True
    return np.flatnonzero(used)


def renumbering(kept_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return int32 [vocab_size]: an id's row in the compact table; ids that are not kept become `<unk>`."""
    rows = np.full(vocab_size, 3, np.int32)
    rows[kept_ids] = np.arange(len(kept_ids), dtype=np.int32)
    return rows


def expand_table(pretrained: Deferred, kept_ids: torch.Tensor, rows: Deferred, decay: float) -> Deferred:
    """Return the whole table as if it had been trained whole, computed a few rows at a time.

    Args:
        pretrained: fp32 [vocab_size, hidden], before training.
        kept_ids: int64 [rows], ascending.
        rows: fp32 [rows, hidden], after training.
        decay: product of `1 - lr * weight_decay` over all steps.
    """

    def make(start: int, stop: int) -> torch.Tensor:
        table = pretrained.rows(start, stop) * decay
        first, last = torch.searchsorted(kept_ids, torch.tensor([start, stop])).tolist()
        table[kept_ids[first:last] - start] = rows.rows(first, last).cpu()
        return table

    return Deferred(pretrained.shape, pretrained.dtype, make)
