"""Class weights: what they mean, alone and with label smoothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sst2_xlmr.training.loss import class_weights, sum_of_losses
from sst2_xlmr.util.errors import UserError

LABELS = torch.tensor([0, 2, 1, 0, 0, 2])
LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def test_balanced_classes_weigh_the_same_and_rows_one_on_average() -> None:
    weights = class_weights("balanced", LABELS.numpy(), ["a", "b", "c"])
    assert weights is not None
    of_rows = weights[LABELS]
    torch.testing.assert_close(of_rows.mean(), torch.tensor(1.0))
    sums = [float(of_rows[label == LABELS].sum()) for label in range(3)]
    assert sums == pytest.approx([2, 2, 2])


def test_numbers_are_taken_as_they_are() -> None:
    weights = class_weights("0.5,2,0", LABELS.numpy(), ["a", "b", "c"])
    assert weights is not None
    assert weights.tolist() == [0.5, 2, 0]
    assert class_weights(None, LABELS.numpy(), ["a", "b", "c"]) is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_row_counts_as_often_as_its_class_weighs(smoothing: float) -> None:
    weights = torch.tensor([3.0, 1.0, 2.0])
    repeated = LABELS.repeat_interleave(weights[LABELS].long())
    expected = F.cross_entropy(
        LOGITS.repeat_interleave(weights[LABELS].long(), 0), repeated, reduction="sum", label_smoothing=smoothing
    )
    torch.testing.assert_close(sum_of_losses(LOGITS, LABELS, smoothing, weights), expected)
    plain = sum_of_losses(LOGITS, LABELS, smoothing, None)
    torch.testing.assert_close(sum_of_losses(LOGITS, LABELS, smoothing, torch.ones(3)), plain)


def test_a_class_without_rows_cannot_be_balanced() -> None:
    with pytest.raises(UserError, match="no row of class 'b'"):
        class_weights("balanced", np.array([0, 2, 2]), ["a", "b", "c"])
