"""Exact metrics over all ranks: every row is counted once, sums and counts are reduced, never batch means."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F

from sst2_xlmr.batching import collate
from sst2_xlmr.distributed import World, sum_over_ranks
from sst2_xlmr.model import Classifier
from sst2_xlmr.token_cache import TokenCache


class Interrupted(Exception):
    """An evaluation was asked to stop before its end."""


def macro_f1(confusion: torch.Tensor) -> float:
    """Return the mean over classes of F1 = 2 TP / (2 TP + FP + FN); a class that never occurs counts 0 (scikit-learn).

    Args:
        confusion: int64 [labels, predictions].
    """
    hits = confusion.diagonal().double()
    denominator = confusion.sum(0) + confusion.sum(1)
    return float((2 * hits / denominator.clamp(min=1)).mean())


@torch.no_grad()
def predict(model: Classifier, ids: list[list[int]], batch_size: int, device: torch.device) -> torch.Tensor:
    """Return fp32 [texts, labels] on the CPU: every label's probability, in the order of `ids`.

    Args:
        model: in evaluation mode, with the whole vocabulary.
        ids: per text, as the tokenizer gives them.
        batch_size: texts per forward pass; texts of like length go together.
    """
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    labels = np.zeros(len(ids), np.int32)
    rows = TokenCache(np.concatenate(ids).astype(np.int32), offsets, labels)
    probabilities = torch.empty(len(ids), model.head.out_proj.out_features)
    by_length = np.argsort(rows.lengths(), kind="stable")
    for start in range(0, len(ids), batch_size):
        batch = collate(rows, by_length[start : start + batch_size]).to(device)
        logits = model(batch.tokens, batch.padded).float()
        probabilities[torch.from_numpy(by_length[start : start + batch_size])] = logits.softmax(-1).cpu()
    return probabilities


@torch.no_grad()
def evaluate(
    model: Classifier,
    cache: TokenCache,
    batch_size: int,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Evaluate on all rows of a file, shared among the ranks.

    Args:
        model: not wrapped in DDP; is left in the mode that it was in.
        batch_size: rows per forward pass on one rank.
        should_stop: is asked before every forward pass, equally often on every rank, and answers them alike.

    Returns:
        loss (mean cross-entropy, nats), accuracy, macro_f1 and rows; the same on every rank.

    Raises:
        Interrupted: if it was stopped.
    """
    was_training = model.training
    model.eval()
    classes = model.head.out_proj.out_features
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=world.device)
    by_length = np.argsort(cache.lengths(), kind="stable")
    mine = by_length[world.rank :: world.world_size]
    for start in range(0, -(-len(cache) // world.world_size), batch_size):
        if should_stop():
            model.train(was_training)
            raise Interrupted
        if start >= len(mine):  # another rank has one row more
            continue
        batch = collate(cache, mine[start : start + batch_size]).to(world.device)
        logits = model(batch.tokens, batch.padded).float()
        loss_sum += F.cross_entropy(logits, batch.labels, reduction="sum").double()
        confusion += torch.bincount(batch.labels * classes + logits.argmax(-1), minlength=classes * classes)
    sum_over_ranks(world, loss_sum)
    sum_over_ranks(world, confusion)
    model.train(was_training)
    confusion = confusion.view(classes, classes).cpu()
    rows = int(confusion.sum())
    return {
        "loss": float(loss_sum) / rows,
        "accuracy": int(confusion.diagonal().sum()) / rows,
        "macro_f1": macro_f1(confusion),
        "rows": rows,
    }
