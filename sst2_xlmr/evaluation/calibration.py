"""Temperature scaling: one number that makes probabilities mean what they say (Guo et al. 2017).

https://arxiv.org/abs/1706.04599. Logits are divided by a temperature that minimizes the cross-entropy on labelled rows
which the model was not trained on; it stays at 1 unless another is significantly better. No prediction changes. Logits
come from a linear layer, so dividing its weights and bias does the same, and whoever opens the model need not know.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sst2_xlmr.evaluation.metrics import calibration_error_of

# Beyond these, the rows are too few or too easy to tell.
LOWEST, HIGHEST = 0.25, 20.0
_SMALLEST = 1e-30  # a probability that fp32 rounded to 0
_STEPS = 40
# Twice the gain in log-likelihood, beyond which a temperature is significantly better than 1: the 95th percentile of
# chi-squared with one degree of freedom (Wilks 1938, https://doi.org/10.1214/aoms/1177732360).
_SIGNIFICANT_GAIN = 3.84


class Calibration(NamedTuple):
    """A fitted temperature, and the expected calibration error on the rows it was fitted to, before and after."""

    temperature: float
    ece_before: float
    ece_after: float

    def __str__(self) -> str:
        if self.temperature == 1:
            return f"temperature 1, as no other is significantly better on these rows; ECE {self.ece_before:.4f}"
        errors = f"ECE {self.ece_before:.4f} before, {self.ece_after:.4f} with it"
        return f"temperature {self.temperature:.3f}, {errors} on the rows it was fitted to"


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _logits(probabilities: np.ndarray) -> np.ndarray:
    """Return float64 [rows, labels]: logits, up to a constant for each row."""
    return np.log(probabilities.astype(np.float64).clip(min=_SMALLEST))


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return float64 [rows, labels]: the probabilities that the logits divided by `temperature` give."""
    return np.exp(_log_softmax(_logits(probabilities) / temperature))


def calibrate(probabilities: np.ndarray | None, labels: np.ndarray) -> Calibration:
    """Fit a temperature.

    Args:
        probabilities: float [rows, labels], at temperature 1; an evaluation must have kept them.
        labels: int [rows].
    """
    assert probabilities is not None
    logits, rows = _logits(probabilities), np.arange(len(labels))

    def loss(inverse: float) -> float:
        return -float(_log_softmax(logits * inverse)[rows, labels].mean())

    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(_STEPS):  # the loss is convex in the inverse temperature
        third = (high - low) / 3
        if loss(low + third) < loss(high - third):
            high -= third
        else:
            low += third
    inverse = (low + high) / 2
    before = calibration_error_of(probabilities, labels)
    if 2 * len(labels) * (loss(1.0) - loss(inverse)) <= _SIGNIFICANT_GAIN:
        return Calibration(1.0, before, before)
    return Calibration(1 / inverse, before, calibration_error_of(tempered(probabilities, 1 / inverse), labels))
