"""Exact metrics over all ranks: every row is counted once, sums and counts are reduced, never batch means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F

from sst2_xlmr.data.batches import Batch, collate
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.distributed import World, gather_objects, sum_over_ranks
from sst2_xlmr.evaluation.metrics import calibration_sums, confusion_matrix, summarize
from sst2_xlmr.model.classifier import Classifier


class Interrupted(Exception):
    """An evaluation was asked to stop before its end."""


@dataclass(frozen=True)
class Evaluation:
    """What came out on the rows of a file.

    Attributes:
        metrics: see `metrics.summarize`; the same on every rank.
        confusion: int64 [labels, predictions]; the same on every rank.
        probabilities: float32 [rows, labels], in the file's order; on rank 0, if they were asked for.
    """

    metrics: dict[str, Any]
    confusion: np.ndarray
    probabilities: np.ndarray | None


def batches_of_like_length(lengths: np.ndarray, batch_tokens: int, world_size: int = 1) -> Iterator[np.ndarray]:
    """Yield the numbers of all rows, shortest first, cut into batches of so many tokens, padding included, at most.

    A row that is longer makes a batch alone.

    Args:
        lengths: int [rows], tokens per row, at least 1.
        batch_tokens: of each rank's share of a batch.
        world_size: ranks that take a batch's rows in turn.
    """
    order = np.argsort(lengths, kind="stable")
    while len(order):
        lengths_here = lengths[order[: batch_tokens * world_size]]
        # Of a batch that would end with each row: the rows of its largest share, and that share's tokens.
        rows_of_share = -(-np.arange(1, len(lengths_here) + 1) // world_size)
        sizes = lengths_here * rows_of_share
        rows = max(1, int(np.searchsorted(sizes, batch_tokens, side="right")))
        yield order[:rows]
        order = order[rows:]


def _logits(model: Classifier, cache: TokenCache, rows: np.ndarray, device: torch.device) -> tuple[Batch, torch.Tensor]:
    """Return some rows as a batch, and their fp32 logits [rows, labels]."""
    batch = collate(cache, rows).to(device)
    return batch, model(batch.tokens, batch.padded).float()


@torch.no_grad()
def predict(model: Classifier, ids: list[list[int]], batch_tokens: int, device: torch.device) -> torch.Tensor:
    """Return fp32 [texts, labels] on the CPU: every label's probability, in the order of `ids`.

    Args:
        model: in evaluation mode, with the whole vocabulary.
        ids: per text, as the tokenizer gives them.
        batch_tokens: per forward pass (see `batches_of_like_length`).
    """
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    labels = np.zeros(len(ids), np.int32)
    cache = TokenCache(np.concatenate(ids).astype(np.int32), offsets, labels)
    probabilities = torch.empty(len(ids), model.head.out_proj.out_features)
    for rows in batches_of_like_length(cache.lengths(), batch_tokens):
        _, logits = _logits(model, cache, rows, device)
        probabilities[torch.from_numpy(rows)] = logits.softmax(-1).cpu()
    return probabilities


@torch.no_grad()
def evaluate(
    model: Classifier,
    cache: TokenCache,
    batch_tokens: int,
    world: World,
    wants_probabilities: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluate on all rows of a file, shared among the ranks.

    Args:
        model: not wrapped in DDP; is left in the mode that it was in.
        batch_tokens: per forward pass on one rank (see `batches_of_like_length`).
        wants_probabilities: whether rank 0 shall have every row's probabilities.
        should_stop: is asked before every forward pass, equally often on every rank, and answers them alike.

    Raises:
        Interrupted: if it was stopped.
    """
    was_training = model.training
    model.eval()
    classes = model.head.out_proj.out_features
    # Every batch is shared among the ranks, so that all have equally many; some of them may be empty.
    shared = batches_of_like_length(cache.lengths(), batch_tokens, world.world_size)
    batches = [rows[world.rank :: world.world_size] for rows in shared]
    mine = np.concatenate(batches)
    # They stay on the device until all rows are through, so that a GPU need not be waited for at every batch.
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    predictions = torch.empty(len(mine), dtype=torch.int64, device=world.device)
    confidences = torch.empty(len(mine), device=world.device)
    probabilities = torch.empty(len(mine) if wants_probabilities else 0, classes, device=world.device)
    done = 0
    for rows in batches:
        if should_stop():
            model.train(was_training)
            raise Interrupted
        if not len(rows):
            continue
        batch, logits = _logits(model, cache, rows, world.device)
        place = slice(done, done + len(rows))
        done += len(rows)
        loss_sum += F.cross_entropy(logits, batch.labels, reduction="sum").double()
        softmax = logits.softmax(-1)
        predictions[place] = logits.argmax(-1)
        confidences[place] = softmax.amax(-1)
        if wants_probabilities:
            probabilities[place] = softmax
    model.train(was_training)

    predicted, labels = predictions.cpu().numpy(), cache.labels[mine]
    calibration = calibration_sums(confidences.cpu().numpy(), predicted == labels)
    confusion = confusion_matrix(labels, predicted, classes)
    # Counts are whole numbers, which float64 adds exactly.
    parts = [np.array([float(loss_sum)]), calibration.ravel(), confusion.ravel().astype(np.float64)]
    sums = sum_over_ranks(world, torch.from_numpy(np.concatenate(parts)).to(world.device)).cpu().numpy()
    calibration = sums[1 : 1 + calibration.size].reshape(calibration.shape)
    confusion = sums[1 + calibration.size :].astype(np.int64).reshape(classes, classes)

    in_order = None
    if wants_probabilities:
        shares = gather_objects(world, (mine, probabilities.cpu().numpy()))
        if world.is_main:
            in_order = np.empty((len(cache), classes), np.float32)
            for rows, values in shares:
                in_order[rows] = values
    return Evaluation(summarize(confusion, calibration, float(sums[0])), confusion, in_order)
