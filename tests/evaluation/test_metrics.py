"""Figures of merit against numbers worked out by hand or by scikit-learn 1.5."""

from __future__ import annotations

import time

import numpy as np
import pytest

from sst2_xlmr.evaluation.metrics import (
    accuracy,
    accuracy_interval,
    calibration_sums,
    confusion_matrix,
    expected_calibration_error,
    macro_f1,
    mean_of,
    per_class,
    share_below,
    summarize,
)

LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2], np.int32)
PREDICTIONS = np.array([0, 1, 0, 1, 1, 2, 1, 0, 1, 1])


def test_confusion_matrix_has_labels_as_rows() -> None:
    confusion = confusion_matrix(LABELS, PREDICTIONS, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 3, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0]]
    halves = [confusion_matrix(LABELS[part], PREDICTIONS[part], 4) for part in (slice(4), slice(4, None))]
    assert (halves[0] + halves[1]).tolist() == confusion.tolist()
    assert accuracy(confusion) == 0.5


def test_per_class_is_scikit_learns() -> None:
    """precision_recall_fscore_support(LABELS, PREDICTIONS, zero_division=0)"""
    found = per_class(confusion_matrix(LABELS, PREDICTIONS, 3))
    assert found["precision"] == pytest.approx([2 / 3, 0.5, 0])
    assert found["recall"] == pytest.approx([2 / 3, 0.75, 0])
    assert found["f1"] == pytest.approx([2 / 3, 0.6, 0])
    assert found["support"].tolist() == [3, 4, 3]


def test_macro_f1_by_hand() -> None:
    assert macro_f1(np.array([[3, 1], [2, 4]])) == pytest.approx((2 * 3 / 9 + 2 * 4 / 11) / 2)
    assert macro_f1(np.array([[5, 0], [5, 0]])) == pytest.approx((2 / 3 + 0) / 2)
    assert macro_f1(np.array([[5, 0], [0, 0]])) == 0.5, "a class that never occurs counts 0"


def test_ece_by_hand() -> None:
    # Bins of 1/15: two rows in (0.9333, 1], one right; one in (0.6, 0.6667], right; 0.6 itself is in the bin below.
    confidences = np.array([0.95, 0.99, 0.65, 0.6])
    sums = calibration_sums(confidences, np.array([True, False, True, False]))
    assert sums.shape == (2, 15)
    assert np.flatnonzero(sums[0]).tolist() == [8, 9, 14]
    expected = (abs(0.95 + 0.99 - 1) + abs(0.65 - 1) + abs(0.6 - 0)) / 4
    assert expected_calibration_error(sums, 4) == pytest.approx(expected)


def test_ece_of_the_ends() -> None:
    sums = calibration_sums(np.array([1, 0, np.nextafter(np.float32(1), np.float32(2))], np.float32), np.ones(3, bool))
    assert sums[1].tolist() == [1, *[0] * 13, 2]
    perfect = calibration_sums(np.full(10, 0.7), np.arange(10) < 7)
    assert expected_calibration_error(perfect, 10) == pytest.approx(0)


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


def test_interval_of_all_and_none() -> None:
    assert accuracy_interval(40, 40) == (1, 1)
    assert accuracy_interval(0, 40) == (0, 0)


def test_interval_is_quick() -> None:
    start = time.perf_counter()
    accuracy_interval(900_000, 1_000_000)
    assert time.perf_counter() - start < 0.5


def test_summary_and_mean() -> None:
    confusion = np.array([[30, 10], [5, 55]])
    found = summarize(confusion, calibration_sums(np.full(100, 0.9), np.arange(100) < 85), 25.0)
    assert (found["loss"], found["accuracy"], found["rows"]) == (0.25, 0.85, 100)
    assert found["ece"] == pytest.approx(0.05)
    assert found["precision"] == pytest.approx([30 / 35, 55 / 65])
    assert found["recall"] == pytest.approx([30 / 40, 55 / 60])
    assert found["accuracy_low"] < 0.85 < found["accuracy_high"]
    mean = mean_of([found, {"accuracy": 0.95, "macro_f1": 1.0, "ece": 0.15}])
    assert mean["accuracy"] == pytest.approx(0.9)
    assert mean["ece"] == pytest.approx(0.1)


def test_share_below() -> None:
    assert share_below(np.array([0.9, 0.1, 0.5, 0.9], np.float32)).tolist() == [0.5, 0, 0.25, 0.5]
