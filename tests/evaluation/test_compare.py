"""A faster precision and its reference."""

from __future__ import annotations

from typing import Optional

import numpy as np
import pytest

from sst2_xlmr.evaluation.compare import check_comparison, compare
from sst2_xlmr.report.table import comparison_table
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.util.errors import UserError

TASK = SingleLabel(["no", "yes"])
Sides = tuple[np.ndarray, np.ndarray, Optional[np.ndarray]]


def sides(found: list[float], expected: list[float], labels: list[int] | None) -> Sides:
    """Of two classes, from the probabilities of class 1."""
    both = [np.stack([1 - np.array(p), np.array(p)], 1).astype(np.float32) for p in (found, expected)]
    return both[0], both[1], None if labels is None else np.array(labels)


# The second label changes, to a wrong one; the third from a wrong one to a right one.
PAIR = sides([0.9, 0.6, 0.45, 0.1], [0.8, 0.4, 0.6, 0.1], [1, 0, 0, 0])
UNLABELLED = sides([0.9], [0.7], None)


def test_figures_by_hand() -> None:
    part = compare(TASK, *PAIR)
    assert (part["rows"], part["changed"]) == (4, 2)
    assert part["largest"] == pytest.approx(0.2)
    found, expected = part["metrics"]
    assert (found["accuracy"], expected["accuracy"]) == (0.75, 0.75)
    # Each row is alone in its bin: 0.9 and 0.9 right, 0.6 wrong, 0.55 right.
    assert found["ece"] == pytest.approx((abs(0.9 - 1) * 2 + 0.6 + 0.45) / 4)
    assert "rows" not in found
    alone = compare(TASK, *UNLABELLED)
    assert (alone["changed"], alone["metrics"]) == (0, None)


def test_the_table_has_a_line_for_every_file_and_one_for_all() -> None:
    lines = comparison_table(TASK, {"fr": PAIR, "de": UNLABELLED}, "int8", "fp32")
    assert len(lines) == 4
    assert lines[0].split()[:7] == ["file", "labels", "changed", "largest", "change", "accuracy", "int8"]
    assert lines[1].split()[:6] == ["fr", "2", "(50.00%)", "0.2000", "0.7500", "(0.7500)"]
    assert lines[2].split() == ["de", "0", "(0.00%)", "0.2000", "-", "-", "-", "1"]
    assert lines[3].split()[2:4] == ["2", "(40.00%)"]
    assert len(comparison_table(TASK, {"fr": PAIR}, "int8", "fp32")) == 2


def test_what_passes_a_bound_is_refused() -> None:
    check_comparison(TASK, {"a": PAIR}, 0.5, 0.0, "int8", "fp32")
    with pytest.raises(UserError, match=r"int8 changes 2 of 4 labels of fp32, 50.00%, and at most 49.00%"):
        check_comparison(TASK, {"a": PAIR}, 0.49, 1.0, "int8", "fp32")
    worse = sides([0.9, 0.6, 0.1], [0.8, 0.4, 0.1], [1, 0, 0])
    with pytest.raises(UserError, match=r"int8 loses 33.33% of accuracy against fp32, and at most 33.00%"):
        check_comparison(TASK, {"a": worse}, 0.5, 0.33, "int8", "fp32")
    check_comparison(TASK, {"a": worse}, 0.5, 0.34, "int8", "fp32")
    with pytest.raises(UserError, match=r"loses 33.33%"):
        check_comparison(TASK, {"a": worse, "b": UNLABELLED}, 0.5, 0.0, "int8", "fp32")
    check_comparison(TASK, {"b": UNLABELLED}, 0.0, 0.0, "int8", "fp32")  # no accuracy to lose
    with pytest.raises(UserError, match="no numbers"):
        check_comparison(TASK, {"a": sides([float("nan")], [0.5], None)}, 1.0, 1.0, "int8", "fp32")
