"""Metrics from labels, predictions and probabilities: NumPy only, no model, no files.

All of them follow from counts and sums, which may come from several ranks: `confusion_matrix` and `calibration_sums`
of parts of the rows add up to those of all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

CALIBRATION_BINS = 15


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Return int64 [labels, predictions]: how many rows of each label got each prediction.

    Args:
        labels, predictions: integers from 0 to `classes` - 1, [rows].
    """
    cells = labels.astype(np.int64) * classes + predictions
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def accuracy(confusion: np.ndarray) -> float:
    """Return the fraction of rows on the diagonal."""
    return float(confusion.trace() / confusion.sum())


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return precision, recall, f1 (float64 [classes]) and support (int64 [classes], rows of that label).

    0 / 0, for a class that never occurs or is never predicted, counts as 0, as in scikit-learn.
    """
    hits, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    return {
        "precision": hits / predicted.clip(1),
        "recall": hits / support.clip(1),
        "f1": 2 * hits / (support + predicted).clip(1),
        "support": support,
    }


def macro_f1(confusion: np.ndarray) -> float:
    """Return the mean of the classes' F1."""
    return float(per_class(confusion)["f1"].mean())


def calibration_sums(confidences: np.ndarray, is_right: np.ndarray) -> np.ndarray:
    """Return float64 [2, bins]: per bin of confidence, the sum of confidences and the number of right predictions.

    Args:
        confidences: [rows], probability of the predicted class; bin m of M holds those in ((m - 1) / M, m / M].
        is_right: bool [rows].
    """
    confidences = confidences.astype(np.float64)
    bins = (np.ceil(confidences * CALIBRATION_BINS).astype(np.int64) - 1).clip(0, CALIBRATION_BINS - 1)
    return np.stack([np.bincount(bins, weights, CALIBRATION_BINS) for weights in (confidences, is_right)])


def expected_calibration_error(sums: np.ndarray, rows: int) -> float:
    """Return the mean distance between confidence and accuracy (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Args:
        sums: what `calibration_sums` returns.
        rows: over how many rows.
    """
    return float(np.abs(sums[0] - sums[1]).sum() / rows)


def calibration_error_of(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error of answers: float [rows, labels], and int [rows]."""
    sums = calibration_sums(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)
    return expected_calibration_error(sums, len(labels))


def accuracy_interval(
    right: int, rows: int, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap percentile interval of an accuracy (Efron 1979, https://doi.org/10.1214/aos/1176344552).

    Of `rows` rows drawn with replacement, a binomial number is right, so that number is drawn at once. If all rows are
    right, or none, the interval is a point.
    """
    accuracies = np.random.RandomState(seed).binomial(rows, right / rows, resamples) / rows
    low, high = np.quantile(accuracies, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_below(scores: np.ndarray) -> np.ndarray:
    """Return float64 [rows]: for every score, the fraction of all rows with a lower one."""
    return np.searchsorted(np.sort(scores), scores) / len(scores)


def summarize(confusion: np.ndarray, calibration: np.ndarray, loss_sum: float) -> dict[str, Any]:
    """Return an evaluation's entry for `metrics.jsonl`; lists have one number per class.

    Args:
        confusion: int64 [labels, predictions].
        calibration: what `calibration_sums` returns.
        loss_sum: of the rows' cross-entropies, nats.
    """
    rows, classes = int(confusion.sum()), per_class(confusion)
    low, high = accuracy_interval(int(confusion.trace()), rows)
    return {
        "loss": loss_sum / rows,
        "accuracy": accuracy(confusion),
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": macro_f1(confusion),
        "ece": expected_calibration_error(calibration, rows),
        "precision": classes["precision"].tolist(),
        "recall": classes["recall"].tolist(),
        "rows": rows,
    }


def mean_of(files: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean over files, each counting the same, of accuracy, macro_f1 and ece."""
    return {key: sum(metrics[key] for metrics in files) / len(files) for key in ("accuracy", "macro_f1", "ece")}
