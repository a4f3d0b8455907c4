"""Notice a run that has stopped learning: it answers every text alike.

It is XLM-R's best-known failure in fine-tuning, mostly at a rate that is too high for the seed: the encoder's output no
longer depends on its input, and the loss stays at that of always answering by the share of the classes. A run that
learns slowly looks similar for a while, but its answers still differ from text to text, as those of a new head on a
pretrained encoder do. And it has not been better before: a run that has, and whose loss is that of a constant answer
again, has collapsed too, even if its answers still differ.
"""

from __future__ import annotations

import math

import numpy as np

from sst2_xlmr.training.loss import constant_loss
from sst2_xlmr.training.state import Progress

# A suspicion arises once the mean loss of a line of metrics is so close to that of a constant answer ...
_SUSPICIOUS_LOSS = 0.98
# ... so many steps after warm-up, and again after so many more steps.
_STEPS_TO_LEARN, _STEPS_BETWEEN_LOOKS = 100, 100
# Answers are alike if the logarithm of no class's probability deviates by more than this over the texts. New heads on
# the small encoder begin with 0.005 to 0.007; six runs that had collapsed were between 0 and 0.0008.
_MOST_DEVIATION = 2e-3
# A run has learned once the mean loss of a line of metrics, plus three standard errors, is below this part of that of a
# constant answer. The deviation of a row's loss, in nats, is mostly less where nothing has been learned.
_LEARNED_LOSS, _LOSS_DEVIATION = 0.95, 0.5
# Answers are useless only if they also get right less than this part of what the most frequent label gets wrong: on
# dev, overfitting makes the loss high as well.
_LITTLE_ACCURACY = 0.2


def is_suspicious(loss: float, constant: float, steps_since_warmup: int, progress: Progress) -> bool:
    """Whether to look at dev's answers: the loss is no better than that of a constant answer.

    Args:
        loss: mean over the last line of metrics, nats a row.
        constant: what `constant_loss` returns.
        steps_since_warmup: taken so far, also negative.
    """
    is_late = steps_since_warmup >= _STEPS_TO_LEARN and progress.step - progress.checked_step >= _STEPS_BETWEEN_LOOKS
    return is_late and not progress.collapsed_step and loss >= _SUSPICIOUS_LOSS * constant


def beats_constant(loss: float, rows: float, constant: float) -> bool:
    """Whether a line of metrics, the mean loss of so many rows, is clearly better than a constant answer."""
    return loss + 3 * _LOSS_DEVIATION / math.sqrt(rows) < _LEARNED_LOSS * constant


def answers_alike(probabilities: np.ndarray, labels: np.ndarray) -> bool:
    """Whether all rows get the same label, and all but the same probabilities, although their true labels differ.

    Args:
        probabilities: float [rows, classes].
        labels: int [rows].
    """
    if len(np.unique(probabilities.argmax(1))) > 1 or len(np.unique(labels)) < 2:
        return False
    return bool(_logarithms(probabilities).std(0).max() <= _MOST_DEVIATION)


def answers_are_useless(probabilities: np.ndarray, labels: np.ndarray) -> bool:
    """Whether the answers are hardly better than the most frequent label alone, in loss and in accuracy.

    Args:
        probabilities: float [rows, classes].
        labels: int [rows].
    """
    loss = -float(_logarithms(probabilities[np.arange(len(labels)), labels]).mean())
    constant = constant_loss(labels, np.ones(probabilities.shape[1]), smoothing=0.0)
    accuracy, most = float((probabilities.argmax(1) == labels).mean()), np.bincount(labels).max() / len(labels)
    return loss >= _SUSPICIOUS_LOSS * constant and accuracy - most < _LITTLE_ACCURACY * (1 - most)


def _logarithms(probabilities: np.ndarray) -> np.ndarray:
    """Return fp64 logarithms, finite for a probability of 0 too."""
    return np.log(probabilities.astype(np.float64).clip(min=np.finfo(np.float32).tiny))


def why_collapsed(probabilities: np.ndarray, labels: np.ndarray, has_learned: bool, names: list[str]) -> str:
    """Return what shows in the answers to dev that a run has collapsed; nothing if it has not.

    Args:
        probabilities: float [rows, classes].
        labels: int [rows].
        has_learned: whether the run has been better before.
        names: of the classes.
    """
    label = names[int(np.bincount(probabilities.argmax(1)).argmax())]
    if answers_alike(probabilities, labels):
        return f"every text of dev gets the label {label!r}, with the same probability"
    if has_learned and answers_are_useless(probabilities, labels):
        return f"it had learned, but is now hardly better than the label {label!r} for every text of dev"
    return ""
