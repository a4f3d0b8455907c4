"""Exact metrics over all ranks: every row is counted once, sums and counts are reduced, never batch means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sst2_xlmr.data.batches import Batch, collate
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.evaluation.metrics import calibration_sums, confusion_matrix, summarize
from sst2_xlmr.util.distributed import World, gather_objects, sum_over_ranks


class Interrupted(Exception):
    """An evaluation was stopped before its end."""


@dataclass(frozen=True)
class Evaluation:
    """The result on a file's rows.

    Attributes:
        metrics: see `metrics.summarize`; the same on every rank.
        confusion: int64 [labels, predictions]; the same on every rank.
        probabilities: float32 [rows, labels], in the file's order; on rank 0, if they were kept.
    """

    metrics: dict[str, Any]
    confusion: np.ndarray
    probabilities: np.ndarray | None


def batches_of_like_length(lengths: np.ndarray, batch_tokens: int, world_size: int = 1) -> Iterator[np.ndarray]:
    """Yield the numbers of all rows, shortest first, cut into batches of at most `batch_tokens` tokens with padding.

    A longer row is a batch of its own.

    Args:
        lengths: int [rows], tokens per row, at least 1.
        batch_tokens: per rank.
        world_size: ranks that take a batch's rows in turn.
    """
    order = np.argsort(lengths, kind="stable")
    while len(order):
        lengths_here = lengths[order[: batch_tokens * world_size]]
        # For a batch that ends with each row: how many rows and tokens the first rank has, which has most.
        rank_rows = -(-np.arange(1, len(lengths_here) + 1) // world_size)
        sizes = lengths_here * rank_rows
        rows = max(1, int(np.searchsorted(sizes, batch_tokens, side="right")))
        yield order[:rows]
        order = order[rows:]


def _logits(model: nn.Module, cache: TokenCache, rows: np.ndarray, device: torch.device) -> tuple[Batch, torch.Tensor]:
    """Return some rows as a batch, and their fp32 logits [rows, labels]."""
    batch = collate(cache, rows).to(device)
    return batch, model(batch.tokens, batch.padded).float()


@torch.no_grad()
def predict(model: nn.Module, ids: list[list[int]], batch_tokens: int, device: torch.device) -> torch.Tensor:
    """Return fp32 [texts, labels] on the CPU: every label's probability, in the order of `ids`.

    Args:
        model: a classifier, or an engine's model of it; in evaluation mode, with the whole vocabulary.
        ids: per text, as the tokenizer gives them.
        batch_tokens: per forward pass (see `batches_of_like_length`).
    """
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    labels = np.zeros(len(ids), np.int32)
    cache = TokenCache(np.concatenate(ids).astype(np.int32), offsets, labels)
    probabilities = torch.empty(len(ids), model.num_labels)
    for rows in batches_of_like_length(cache.lengths(), batch_tokens):
        _, logits = _logits(model, cache, rows, device)
        probabilities[torch.from_numpy(rows)] = logits.softmax(-1).cpu()
    return probabilities


@torch.no_grad()
def evaluate(
    model: nn.Module,
    cache: TokenCache,
    batch_tokens: int,
    world: World,
    keep_probabilities: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluate on all rows of a file, split over the ranks.

    Args:
        model: a classifier, or an engine's model of it, not under DDP; its mode is restored.
        batch_tokens: per forward pass on one rank (see `batches_of_like_length`).
        keep_probabilities: whether rank 0 gets every row's probabilities.
        should_stop: called before every forward pass, equally often on every rank; must return the same on all.

    Raises:
        Interrupted: if it was stopped.
    """
    # Every rank takes a part of every batch, so that all have the same number of batches; a part may be empty.
    global_batches = batches_of_like_length(cache.lengths(), batch_tokens, world.world_size)
    batches = [rows[world.rank :: world.world_size] for rows in global_batches]
    rank_rows = np.concatenate(batches)
    was_training = model.training
    model.eval()
    try:
        outputs = _run(model, cache, batches, world.device, keep_probabilities, should_stop)
    finally:
        model.train(was_training)
    metrics, confusion = _sum_up(outputs, cache.labels[rank_rows], world)
    probabilities = None
    if keep_probabilities:
        parts = gather_objects(world, (rank_rows, outputs.probabilities.cpu().numpy()))
        if world.is_main:
            probabilities = np.empty((len(cache), model.num_labels), np.float32)
            for rows, values in parts:
                probabilities[rows] = values
    return Evaluation(metrics, confusion, probabilities)


class _Outputs(NamedTuple):
    """Results of a rank's rows, in the order of its batches, on its device.

    Attributes:
        loss_sum: float64, no dimensions; cross-entropy, nats.
        predictions: int64 [rows].
        confidences: fp32 [rows], probability of the predicted label.
        probabilities: fp32 [rows, labels], or no rows if they are not kept, since many labels need much memory.
    """

    loss_sum: torch.Tensor
    predictions: torch.Tensor
    confidences: torch.Tensor
    probabilities: torch.Tensor


def _run(
    model: nn.Module,
    cache: TokenCache,
    batches: list[np.ndarray],
    device: torch.device,
    keep_probabilities: bool,
    should_stop: Callable[[], bool],
) -> _Outputs:
    """Run the model on a rank's batches; results stay on the device, so that no batch waits for a GPU."""
    rows_in_all = sum(map(len, batches))
    outputs = _Outputs(
        torch.zeros((), dtype=torch.float64, device=device),
        torch.empty(rows_in_all, dtype=torch.int64, device=device),
        torch.empty(rows_in_all, device=device),
        torch.empty(rows_in_all if keep_probabilities else 0, model.num_labels, device=device),
    )
    done = 0
    for rows in batches:
        if should_stop():
            raise Interrupted
        if not len(rows):
            continue
        batch, logits = _logits(model, cache, rows, device)
        place = slice(done, done + len(rows))
        done += len(rows)
        outputs.loss_sum.add_(F.cross_entropy(logits, batch.labels, reduction="sum").double())
        softmax = logits.softmax(-1)
        outputs.predictions[place] = logits.argmax(-1)
        outputs.confidences[place] = softmax.amax(-1)
        if keep_probabilities:
            outputs.probabilities[place] = softmax
    return outputs


def _sum_up(outputs: _Outputs, labels: np.ndarray, world: World) -> tuple[dict[str, Any], np.ndarray]:
    """Return metrics and confusion matrix over all ranks.

    Args:
        labels: int [rows], of this rank's rows.
    """
    classes = outputs.probabilities.shape[1]
    predictions = outputs.predictions.cpu().numpy()
    calibration = calibration_sums(outputs.confidences.cpu().numpy(), predictions == labels)
    confusion = confusion_matrix(labels, predictions, classes)
    # Counts are whole numbers, which float64 adds exactly.
    parts = [np.array([float(outputs.loss_sum)]), calibration.ravel(), confusion.ravel().astype(np.float64)]
    sums = sum_over_ranks(world, torch.from_numpy(np.concatenate(parts)).to(world.device)).cpu().numpy()
    calibration = sums[1 : 1 + calibration.size].reshape(calibration.shape)
    confusion = sums[1 + calibration.size :].astype(np.int64).reshape(classes, classes)
    return summarize(confusion, calibration, float(sums[0])), confusion
