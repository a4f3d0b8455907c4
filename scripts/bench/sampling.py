"""Which batches of an epoch are measured. Needs NumPy alone, since it also runs in the peer's environment."""

from __future__ import annotations

import numpy as np


def choose_batches(
    batches: np.ndarray, lengths: np.ndarray, warmup_steps: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose a few batches that stand for a whole epoch: spread evenly over the lengths that batches are padded to.

    They are not spread evenly over the epoch: the Trainer's `group_by_length` begins every 50 batches with the longest,
    so that every 50th batch would be a longest one.

    Args:
        batches: int64 [batches, batch_size], the rows of an epoch's full batches, in the order of training.
        lengths: int [rows], tokens per row of the whole file.
        warmup_steps: how many batches to warm up with; none of them is timed, if the epoch has enough batches.
        steps: how many batches to time; from an epoch with fewer, some are taken more than once.

    Returns:
        The batches to warm up with, int64 [warmup_steps, batch_size], and those to time, int64 [steps, batch_size],
        both in the order of training.
    """
    tokens = lengths[batches]
    by_length = np.lexsort((tokens.sum(axis=1), tokens.max(axis=1)))  # ascending; the last key is the first criterion
    timed = _take_evenly(by_length, steps)
    rest = by_length[~np.isin(by_length, timed)]
    warmup = _take_evenly(rest if len(rest) else by_length, warmup_steps)
    return batches[np.sort(warmup)], batches[np.sort(timed)]


def _take_evenly(values: np.ndarray, count: int) -> np.ndarray:
    return values[((np.arange(count) + 0.5) * len(values) / count).astype(np.int64)]
