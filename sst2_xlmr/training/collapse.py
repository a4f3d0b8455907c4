"""Notice a run that has stopped learning: it answers every text alike.

It is XLM-R's best-known failure in fine-tuning, mostly at a rate that is too high for the seed: the encoder's output no
longer depends on its input, and the loss stays at that of always answering by the share of the classes. A run that
learns slowly looks similar for a while, but its probabilities already rank texts better than chance.
"""

from __future__ import annotations

import math

import numpy as np

# A suspicion arises once the mean loss of a line of metrics is so close to that of a constant answer ...
_SUSPICIOUS_LOSS = 0.98
# ... so many steps after warm-up, and again after so many more steps.
_STEPS_TO_LEARN, _STEPS_BETWEEN_CHECKS = 100, 100
# Between the rows of a class and the others, the mean probability of that class may differ by chance: by so many
# standard errors. That is at least the first of these parts of its deviation, for models were seen whose answers were
# all alike but still varied a little with a text's length; and on few rows no more than the second.
_STANDARD_ERRORS, _BY_CHANCE, _MOST_BY_CHANCE = 3.0, 0.4, 0.6


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


def is_suspicious(loss: float, constant: float, steps_after_warmup: int, steps_since_check: int) -> bool:
    """Whether to look at dev's answers: the loss is no better than that of a constant answer.

    Args:
        loss: mean over the last line of metrics, nats a row.
        constant: what `constant_loss` returns.
        steps_after_warmup: taken so far, also negative.
        steps_since_check: since the last look.
    """
    late = steps_after_warmup >= _STEPS_TO_LEARN and steps_since_check >= _STEPS_BETWEEN_CHECKS
    return late and loss >= _SUSPICIOUS_LOSS * constant


def answers_alike(probabilities: np.ndarray, labels: np.ndarray) -> bool:
    """Whether all rows get the same label, and probabilities that say no more about the true one than chance does.

    Args:
        probabilities: float [rows, classes].
        labels: int [rows].
    """
    if len(np.unique(probabilities.argmax(1))) > 1 or len(np.unique(labels)) < 2:
        return False
    return all(
        _is_chance(probabilities[:, number].astype(np.float64), labels == number) for number in np.unique(labels)
    )


def _is_chance(values: np.ndarray, is_class: np.ndarray) -> bool:
    """Whether the values of a class's rows are those of the others, up to chance."""
    deviation, share = values.std(), is_class.mean()
    if not deviation:
        return True
    error = 1 / math.sqrt(len(values) * share * (1 - share))  # of the difference of means, in deviations
    difference = abs(values[is_class].mean() - values[~is_class].mean()) / deviation
    return bool(difference < min(max(_STANDARD_ERRORS * error, _BY_CHANCE), _MOST_BY_CHANCE))
