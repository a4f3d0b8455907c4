"""The loss: cross-entropy, smoothed, times the weight of the row's class."""

from __future__ import annotations

import math
from functools import partial
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F

from sst2_xlmr.config import Config
from sst2_xlmr.util.errors import UserError

# Takes fp32 logits [rows, classes] and int64 labels [rows]; returns the sum of the rows' losses, fp32.
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_loss(config: Config, labels: np.ndarray, device: torch.device) -> Loss:
    """Return a run's training loss.

    Args:
        labels: int [rows], those of the training file.

    Raises:
        UserError: see `class_weights`.
    """
    weights = class_weights(config.class_weights, labels, config.classes)
    weights = None if weights is None else weights.to(device)
    return partial(sum_of_losses, smoothing=config.label_smoothing, weights=weights)


def loss_of_constant_answer(config: Config, labels: np.ndarray) -> float:
    """Return `constant_loss` for a run's class weights and label smoothing; labels are int [rows]."""
    weights = class_weights(config.class_weights, labels, config.classes)
    factors = np.ones(len(config.classes)) if weights is None else weights.numpy()
    return constant_loss(labels, factors, config.label_smoothing)


def constant_loss(labels: np.ndarray, weights: np.ndarray, smoothing: float) -> float:
    """Return the training loss, nats a row, of the best answer that is the same for every text.

    Args:
        labels: int [rows], of the training file.
        weights: float [classes], of the classes in the loss.
        smoothing: of the labels.
    """
    classes = len(weights)
    counted = np.bincount(labels, minlength=classes) * weights
    answer = (1 - smoothing) * counted / counted.sum() + smoothing / classes
    entropy = -float(sum(p * math.log(p) for p in answer if p > 0))
    return entropy * float(counted.sum()) / len(labels)


def class_weights(choice: str | None, labels: np.ndarray, names: list[str]) -> torch.Tensor | None:
    """Return fp32 [classes], or None where all classes weigh 1.

    Args:
        choice: `--class-weights`, checked; `balanced` is rows / (classes * rows of the class): every class has the
            same weight in all, and the mean over the training rows is 1.
        labels: int [rows], those of the training file.
        names: of the classes.

    Raises:
        UserError: if a class has no row to balance.
    """
    if choice is None:
        return None
    if choice == "balanced":
        counts = np.bincount(labels, minlength=len(names))
        if not counts.all():
            raise UserError(
                f"--class-weights balanced: the training file has no row of class {names[int(counts.argmin())]!r};"
                " leave it out of --label-names, or give the weights as numbers"
            )
        return torch.from_numpy(len(labels) / (len(names) * counts)).float()
    return torch.tensor([float(weight) for weight in choice.split(",")])


def sum_of_losses(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return the sum over rows of the loss times the weight of the row's class.

    `F.cross_entropy` has weights too, but applies every class's own weight to the smoothed part of a row.

    Args:
        logits: fp32 [rows, classes].
        labels: int64 [rows].
        smoothing: probability mass spread evenly over all classes.
        weights: fp32 [classes], or None.
    """
    if weights is None:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return (losses * weights[labels]).sum()
