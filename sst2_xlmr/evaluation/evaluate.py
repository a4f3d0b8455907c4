"""Run a model over rows: exact metrics, over all ranks, and probabilities for prediction.

Every row is counted once. Each rank computes its rows' results (see task.py), all ranks gather them, in the file's
order, and metrics are made of the whole: they do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch
from torch import nn

from sst2_xlmr.data.batches import select_rows
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.task import Task
from sst2_xlmr.util.distributed import World, gather_objects
from sst2_xlmr.util.errors import Interrupted


@dataclass(frozen=True)
class Evaluation:
    """The result on a file's rows, the same on every rank.

    Attributes:
        metrics: what the task makes of the results.
        results: fp32 [rows, ...], every row's results (see `task.row_results`), in the file's order.
        probabilities: fp32 [rows, outputs], in the file's order; None if they were not kept.
    """

    metrics: dict[str, Any]
    results: np.ndarray
    probabilities: np.ndarray | None

    def with_temperature(self, temperature: float, task: Task, labels: np.ndarray) -> Evaluation:
        """Return the evaluation of the model whose logits are divided by a temperature; probabilities must be kept."""
        if temperature == 1 or self.probabilities is None:
            return self
        results = task.results_of(self.probabilities, labels, temperature)
        return Evaluation(task.metrics(results, labels), results, tempered(task, self.probabilities, temperature))


def tempered(task: Task, probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return fp32 [rows, outputs]: the probabilities that the logits divided by a temperature give."""
    return task.probabilities(torch.from_numpy(task.logits_of(probabilities) / temperature)).float().numpy()


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


@torch.no_grad()
def logits_of(
    model: nn.Module, ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Return fp32 logits of some rows, [rows, outputs]; `ids` and `offsets` as in `select_rows`."""
    selected, lengths = select_rows(ids, offsets, rows)
    logits: torch.Tensor = model(selected.to(device), lengths).float()
    return logits


def predict(
    model: nn.Module, task: Task, ids: np.ndarray, lengths: np.ndarray, batch_tokens: int, device: torch.device
) -> np.ndarray:
    """Return fp32 [texts, outputs]: every text's probabilities, in the order of the texts.

    Args:
        model: a classifier, or an engine's model of it; in evaluation mode, with the whole vocabulary.
        ids, lengths: int32 [tokens] and int64 [texts], as the tokenizer gives them.
        batch_tokens: per forward pass (see `batches_of_like_length`).
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    probabilities = np.empty((len(lengths), task.outputs), np.float32)
    for rows in batches_of_like_length(lengths, batch_tokens):
        logits = logits_of(model, ids, offsets, rows, device)
        probabilities[rows] = task.probabilities(logits).cpu().numpy()
    return probabilities


def evaluate(
    model: nn.Module,
    task: Task,
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
        keep_probabilities: whether all rows' probabilities are wanted; many labels need much memory.
        should_stop: called before every forward pass, equally often on every rank; must return the same on all.

    Raises:
        Interrupted: if it was stopped.
    """
    # Every rank takes a part of every batch, so that all have the same number of batches; a part may be empty.
    batches = list(batches_of_like_length(cache.lengths(), batch_tokens, world.world_size))
    labels, results, kept = cache.labels, [], []  # these stay on the device, so that no batch waits for a GPU
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if should_stop():
                raise Interrupted
            rows = batch[world.rank :: world.world_size]
            if len(rows):
                logits = logits_of(model, cache.ids, cache.offsets, rows, world.device)
                results.append(task.row_results(logits, torch.from_numpy(labels[rows]).long().to(world.device)))
                kept.append(task.probabilities(logits) if keep_probabilities else logits[:, :0])
    finally:
        model.train(was_training)
    mine = [torch.cat(parts).cpu().numpy() if parts else np.empty((0, 0), np.float32) for parts in (results, kept)]
    order = [[batch[rank :: world.world_size] for batch in batches] for rank in range(world.world_size)]
    gathered = [(np.concatenate(rows), part) for rows, part in zip(order, gather_objects(world, mine)) if len(part[0])]

    def in_order(which: int) -> np.ndarray:
        whole = np.empty((len(cache), gathered[0][1][which].shape[1]), np.float32)
        for rows, parts in gathered:
            whole[rows] = parts[which]
        return whole

    whole = in_order(0)
    return Evaluation(task.metrics(whole, labels), whole, in_order(1) if keep_probabilities else None)
