"""A faster precision and its reference."""

from __future__ import annotations

import numpy as np
import pytest

from sst2_xlmr.evaluation.compare import Answers, agreement_table, check_agreement, compare
from sst2_xlmr.util.errors import UserError


def answers(found: list[float], expected: list[float], labels: list[int] | None) -> Answers:
    """Of two classes, from the probabilities of class 1."""
    both = [np.stack([1 - np.array(p), np.array(p)], 1).astype(np.float32) for p in (found, expected)]
    return Answers(both[0], both[1], None if labels is None else np.array(labels))


# The second label changes, to a wrong one; the third from a wrong one to a right one.
PAIR = answers([0.9, 0.6, 0.45, 0.1], [0.8, 0.4, 0.6, 0.1], [1, 0, 0, 0])
UNLABELLED = answers([0.9], [0.7], None)


def test_figures_by_hand() -> None:
    part = compare(PAIR)
    assert (part.rows, part.changed) == (4, 2)
    assert part.found is not None and part.expected is not None
    assert (part.found.right, part.expected.right) == (3, 3)
    assert part.largest == pytest.approx(0.2)
    # Each row is alone in its bin: 0.9 and 0.9 right, 0.6 wrong, 0.55 right.
    assert part.found.ece == pytest.approx((abs(0.9 - 1) * 2 + 0.6 + 0.45) / 4)
    alone = compare(UNLABELLED)
    assert (alone.changed, alone.found, alone.expected) == (0, None, None)


def test_the_table_has_a_line_for_every_file_and_one_for_all() -> None:
    lines = agreement_table({"fr": PAIR, "de": UNLABELLED}, "int8", "fp32")
    assert len(lines) == 4
    assert lines[1].split()[:6] == ["fr", "2", "(50.00%)", "0.2000", "0.7500", "(0.7500)"]
    assert lines[2].split() == ["de", "0", "(0.00%)", "0.2000", "-", "-", "1"]
    assert lines[3].split()[2:4] == ["2", "(40.00%)"]
    assert len(agreement_table({"fr": PAIR}, "int8", "fp32")) == 2


def test_what_passes_a_bound_is_refused() -> None:
    check_agreement({"a": PAIR}, 0.5, 0.0, "int8", "fp32")
    with pytest.raises(UserError, match=r"int8 changes 2 of 4 labels of fp32, 50.00%, and at most 49.00%"):
        check_agreement({"a": PAIR}, 0.49, 1.0, "int8", "fp32")
    worse = answers([0.9, 0.6, 0.1], [0.8, 0.4, 0.1], [1, 0, 0])
    with pytest.raises(UserError, match=r"int8 loses 33.33% of accuracy against fp32, and at most 33.00%"):
        check_agreement({"a": worse}, 0.5, 0.33, "int8", "fp32")
    check_agreement({"a": worse}, 0.5, 0.34, "int8", "fp32")
    with pytest.raises(UserError, match=r"loses 33.33%"):
        check_agreement({"a": worse, "b": UNLABELLED}, 0.5, 0.0, "int8", "fp32")
    check_agreement({"b": UNLABELLED}, 0.0, 0.0, "int8", "fp32")  # no accuracy to lose
    with pytest.raises(UserError, match="no numbers"):
        check_agreement({"a": answers([float("nan")], [0.5], None)}, 1.0, 1.0, "int8", "fp32")
