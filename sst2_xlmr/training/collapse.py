"""Notice a run that has stopped learning: it answers every text alike.

It is XLM-R's best-known failure in fine-tuning, mostly at a rate that is too high for the seed: the encoder's output no
longer depends on its input, and the loss stays at that of always answering by the share of the classes. A run that
learns slowly looks similar for a while, but its answers still differ from text to text, as those of a new head on a
pretrained encoder do.
"""

from __future__ import annotations

import math

import numpy as np

from sst2_xlmr.training.progress import Progress

# A suspicion arises once the mean loss of a line of metrics is so close to that of a constant answer ...
_SUSPICIOUS_LOSS = 0.98
# ... so many steps after warm-up, and again after so many more steps.
_STEPS_TO_LEARN, _STEPS_BETWEEN_LOOKS = 100, 100
# Answers are alike if the logarithm of no class's probability deviates by more than this over the texts. New heads on
# the small encoder begin with 0.005 to 0.007; six runs that had collapsed were between 0 and 0.0008.
_MOST_DEVIATION = 2e-3


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


def is_suspicious(loss: float, constant: float, steps_since_warmup: int, progress: Progress) -> bool:
    """Whether to look at dev's answers: the loss is no better than that of a constant answer.

    Args:
        loss: mean over the last line of metrics, nats a row.
        constant: what `constant_loss` returns.
        steps_since_warmup: taken so far, also negative.
    """
    is_late = steps_since_warmup >= _STEPS_TO_LEARN and progress.step - progress.checked_step >= _STEPS_BETWEEN_LOOKS
    return is_late and not progress.collapsed_step and loss >= _SUSPICIOUS_LOSS * constant


def answers_alike(probabilities: np.ndarray, labels: np.ndarray) -> bool:
    """Whether all rows get the same label, and all but the same probabilities, although their true labels differ.

    Args:
        probabilities: float [rows, classes].
        labels: int [rows].
    """
    if len(np.unique(probabilities.argmax(1))) > 1 or len(np.unique(labels)) < 2:
        return False
    logarithms = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))
    return bool(logarithms.std(0).max() <= _MOST_DEVIATION)
