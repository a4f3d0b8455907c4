"""Definitions of metrics against numbers worked out by hand, and scikit-learn where it is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sst2_xlmr.evaluation import metrics
from sst2_xlmr.evaluation.metrics import (
    accuracy_interval,
    confusion_matrix,
    expected_calibration_error,
    macro_f1,
    mean_of,
    per_class,
)

LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2], np.int32)
PREDICTIONS = np.array([0, 1, 0, 1, 1, 2, 1, 0, 1, 1])


def test_confusion_matrix_has_labels_as_rows() -> None:
    confusion = confusion_matrix(LABELS, PREDICTIONS, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 3, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0]]


def test_per_class_is_scikit_learns() -> None:
    """precision_recall_fscore_support(LABELS, PREDICTIONS, zero_division=0)"""
    found = per_class(confusion_matrix(LABELS, PREDICTIONS, 3))
    assert found["precision"] == pytest.approx([2 / 3, 0.5, 0])
    assert found["recall"] == pytest.approx([2 / 3, 0.75, 0])
    assert found["f1"] == pytest.approx([2 / 3, 0.6, 0])
    assert found["support"].tolist() == [3, 4, 3]


@pytest.mark.parametrize(
    ("confusion", "expected"),
    [
        ([[3, 1], [2, 4]], (2 * 3 / 9 + 2 * 4 / 11) / 2),
        ([[5, 0], [5, 0]], 1 / 3),  # never predicted, but among the labels: it counts as 0
        ([[0, 0], [2, 3]], 0.375),  # no label, but predicted
        ([[5, 0], [0, 0]], 1.0),  # neither
        ([[3, 0, 1], [0, 0, 0], [0, 0, 4]], (6 / 7 + 8 / 9) / 2),
    ],
)
def test_macro_f1_is_of_the_classes_that_occur_among_labels_or_predictions(
    confusion: list[list[int]], expected: float
) -> None:
    assert macro_f1(np.array(confusion)) == pytest.approx(expected)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_agrees_with_scikit_learn(classes: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    for seed in range(20):
        random = np.random.RandomState(seed)
        labels, predictions = random.randint(0, random.randint(1, classes + 1), (2, 12))
        confusion = confusion_matrix(labels, predictions, classes)
        assert macro_f1(confusion) == pytest.approx(sklearn.f1_score(labels, predictions, average="macro"))
        of_all = {"labels": list(range(classes)), "zero_division": 0}
        expected = sklearn.precision_recall_fscore_support(labels, predictions, **of_all)
        for name, values in zip(("precision", "recall", "f1", "support"), expected):
            np.testing.assert_allclose(per_class(confusion)[name], values)


@pytest.mark.parametrize(
    ("confidences", "right", "expected"),
    [
        # Bins of 1/15: two in (0.9333, 1], one right; one in (0.6, 0.6667], right; 0.6 itself is in the bin below.
        ([0.95, 0.99, 0.65, 0.6], [1, 0, 1, 0], (abs(0.95 + 0.99 - 1) + abs(0.65 - 1) + 0.6) / 4),
        ([0.601, 0.6], [1, 0], (0.399 + 0.6) / 2),
        ([1, 0, np.nextafter(np.float32(1), np.float32(2))], [1, 1, 1], 1 / 3),  # the ends, and rounded beyond
        ([0.7] * 10, [1] * 7 + [0] * 3, 0),
    ],
)
def test_ece_by_hand(confidences: list[float], right: list[int], expected: float) -> None:
    found = expected_calibration_error(np.array(confidences), np.array(right, bool))
    assert found == pytest.approx(expected, abs=1e-6)


def test_interval_is_that_of_drawing_rows() -> None:
    """Against resampling row by row, as it is defined."""
    random = np.random.RandomState(7)
    is_right = np.arange(200) < 170
    drawn = is_right[random.randint(0, 200, (10_000, 200))].mean(1)
    low, high = accuracy_interval(170, 200)
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.006)
    assert low < 0.85 < high
    assert accuracy_interval(170, 200) == (low, high), "the same at every call"
    assert accuracy_interval(170, 200, level=0.5)[0] > low
    assert (accuracy_interval(40, 40), accuracy_interval(0, 40)) == ((1, 1), (0, 0))


def test_interval_draws_a_number_for_a_resample_not_for_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a million rows would take a minute."""
    drawn: list[int] = []

    class Counted(np.random.RandomState):
        def binomial(self, *arguments: Any) -> Any:
            values = super().binomial(*arguments)
            drawn.append(values.size)
            return values

        def __getattribute__(self, name: str) -> object:
            assert name in ("binomial", "__class__"), name
            return super().__getattribute__(name)

    monkeypatch.setattr(metrics.np.random, "RandomState", Counted)
    accuracy_interval(900_000, 1_000_000)
    assert drawn == [10_000]


def test_mean_of_files() -> None:
    files: list[dict[str, Any]] = [
        {"accuracy": 0.85, "ece": 0.05, "recall": [1.0], "rows": 100},
        {"accuracy": 0.95, "ece": 0.15},
    ]
    mean = mean_of(files)
    assert mean == {"accuracy": pytest.approx(0.9), "ece": pytest.approx(0.1)}
