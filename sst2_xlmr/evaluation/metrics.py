"""Metrics over NumPy arrays, defined as in scikit-learn; task.py decides which of them a task reports."""

from typing import Any

import numpy as np

CALIBRATION_BINS = 15
LEVEL, RESAMPLES = 0.95, 10_000  # for the confidence interval of an accuracy


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Count the rows of each label with each prediction, int64 [labels, predictions]; arguments are int [rows]."""
    cells = labels.astype(np.int64) * classes + predictions
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return precision, recall, f1 (float64 [classes]; 0 / 0 is 0) and support (int64 [classes], the rows of each)."""
    return per_label(confusion.diagonal(), confusion.sum(0), confusion.sum(1))


def per_label(hits: np.ndarray, predicted: np.ndarray, support: np.ndarray) -> dict[str, np.ndarray]:
    """Like `per_class`, from counts, int64 [labels]: true positives, predicted positives, and rows of the label."""
    return {
        "precision": hits / predicted.clip(1),
        "recall": hits / support.clip(1),
        "f1": 2 * hits / (support + predicted).clip(1),
        "support": support,
    }


def average_precision(scores: np.ndarray, is_label: np.ndarray) -> float:
    """Return the area under the stepwise precision-recall curve; 0 without positives. Arguments are [rows]."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(is_label[order])
    last = np.append(np.diff(scores[order]) != 0, True)  # among rows with equal scores, which share a threshold
    precision, recall = (hits / np.arange(1, len(order) + 1))[last], hits[last] / max(1, hits[-1])
    return float((np.diff(recall, prepend=0) * precision).sum())


def mean_average_precision(scores: np.ndarray, is_label: np.ndarray) -> float:
    """Return the mean over labels; arguments are [rows, labels]."""
    return float(np.mean([average_precision(*column) for column in zip(scores.T, is_label.T)]))


def fitted_threshold(scores: np.ndarray, is_label: np.ndarray, aim: str = "f1", floor: float = 0.0) -> float:
    """Return the threshold on one label's scores with the best F1 among those whose precision or recall >= floor.

    The aim, f1, precision or recall, says which must reach the floor; if none reaches it, the threshold with the
    highest precision (or recall) is used. It lies midway between two scores; without positives, it is 0.5.
    """
    if not is_label.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order].astype(np.float64), np.cumsum(is_label[order])
    predicted, last = np.arange(1, len(order) + 1), np.append(np.diff(scores[order]) != 0, True)
    f1 = 2 * hits / (predicted + hits[-1])
    reached = {"f1": f1, "precision": hits / predicted, "recall": hits / hits[-1]}[aim]
    value = np.where(reached >= floor, 1 + f1, reached) if (reached[last] >= floor).any() else reached
    best = int(np.flatnonzero(last & (value == value[last].max()))[0])
    below = ranked[best + 1] if best + 1 < len(ranked) else 0.0
    return float((ranked[best] + below) / 2)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return the linear correlation of two arrays, [rows]; 0 if one is constant."""
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm > 0 else 0.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return the correlation of the ranks; equal values share their mean rank."""
    ranks = []
    for values in (x, y):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place.reshape(-1)])
    return pearson(*ranks)


def macro_f1(confusion: np.ndarray) -> float:
    """Return the mean F1 over the classes that occur among labels or predictions, like scikit-learn's `f1_score`."""
    occurs = confusion.sum(0) + confusion.sum(1) > 0
    return float(per_class(confusion)["f1"][occurs].mean())


def expected_calibration_error(confidences: np.ndarray, is_correct: np.ndarray) -> float:
    """Return the mean gap between confidence and accuracy (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Confidences, float [rows], are the predicted classes' probabilities; bin m of M holds those in ((m - 1) / M, m / M].
    """
    bins = (np.ceil(confidences * CALIBRATION_BINS).astype(np.int64) - 1).clip(0, CALIBRATION_BINS - 1)
    sums = [np.bincount(bins, weights, CALIBRATION_BINS) for weights in (confidences, is_correct)]
    return float(np.abs(sums[0] - sums[1]).sum() / len(confidences))


def describe_calibration(temperature: float, ece_before: float, ece_after: float) -> str:
    """Describe a fitted temperature, with the expected calibration errors on the rows it was fitted to."""
    if temperature == 1:
        return f"temperature 1, as no other is significantly better on these rows; ECE {ece_before:.4f}"
    errors = f"ECE {ece_before:.4f} before, {ece_after:.4f} with it"
    return f"temperature {temperature:.3f}, {errors} on the rows it was fitted to"


def accuracy_interval(correct: int, rows: int) -> tuple[float, float]:
    """Return an accuracy's 95 % bootstrap percentile interval (Efron 1979, https://doi.org/10.1214/aos/1176344552).

    Among `rows` rows drawn with replacement, the correct ones are binomial, so only their number is drawn. If all rows
    are correct, or none, the interval is a point.
    """
    accuracies = np.random.RandomState(0).binomial(rows, correct / rows, RESAMPLES) / rows
    low, high = np.quantile(accuracies, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_of(files: list[dict[str, Any]]) -> dict[str, float]:
    """Return the unweighted mean over files of each metric that is a float, but not of an interval's ends."""
    numbers = [key for key, value in files[0].items() if isinstance(value, float) and "accuracy_" not in key]
    return {key: sum(metrics[key] for metrics in files) / len(files) for key in numbers}
