"""Where a run is; the sums of a line of metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sst2_xlmr.data.batches import Batch, RankBatch
from sst2_xlmr.training.state import Progress, Totals, Window
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import UserError

ALONE = World.alone(torch.device("cpu"))
BATCH = RankBatch([Batch(torch.zeros(4, 5), torch.zeros(4), torch.zeros(4), False, 20)], 4, False)


def add(window: Window, loss: float = 2.0, norm: float = 0.5) -> None:
    window.add({"loss": torch.tensor(loss, dtype=torch.float64)}, torch.tensor(norm), BATCH)


def test_position_rolls_over_into_the_next_epoch() -> None:
    progress = Progress("x", "y", 3)
    positions = []
    for _ in range(4):
        progress.advance()
        positions.append((progress.step, progress.epoch, progress.batch))
    assert positions == [(1, 0, 1), (2, 0, 2), (3, 1, 0), (4, 1, 1)]


def test_batches_passed_over_in_a_row_are_limited() -> None:
    progress, rows = Progress("x", "y", 10), np.array([4, 7])
    progress.pass_over(2, rows)
    progress.pass_over(2, rows)
    progress.advance()
    assert (progress.step, progress.skipped, progress.skipped_in_row) == (3, 2, 0)
    for _ in range(2):
        progress.pass_over(2, rows)
    with pytest.raises(UserError, match=r"not finite at step 6 \(the last of 3 in a row\).*from 1: 5, 8$"):
        progress.pass_over(2, rows)


def test_means_over_a_window() -> None:
    window = Window(ALONE)
    add(window)
    add(window, 4.0, 0.25)
    window.collect(2)
    window.totals.seconds = 2.0
    line = window.close(Progress("x", "y", 10, step=2, batch=2), lr=0.1)
    assert line == {
        "step": 2,
        "epoch": 0.2,
        "loss": 0.75,
        "lr": 0.1,
        "grad_norm": 0.25,
        "samples_per_s": 4.0,
        "tokens_per_s": 20.0,
    }
    assert window.totals == Totals(grad_norm=0.25)


def test_a_window_that_was_saved_goes_on_with_its_gradient_norm() -> None:
    """Also if the next line of metrics comes before another step, as after a batch that was passed over."""
    window, resumed = Window(ALONE), Window(ALONE)
    add(window, norm=0.75)
    window.collect(1)
    resumed.totals = Totals(**vars(window.totals))
    resumed.go_on()
    resumed.collect(1)
    assert resumed.close(Progress("x", "y", 10, step=1), 0.1)["grad_norm"] == 0.75


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_is_noticed_whatever_comes_after(bad: float) -> None:
    """A norm that overflows although every gradient is finite, and a loss whose gradient is finite."""
    for values in ({"norm": bad}, {"loss": bad}):
        window = Window(ALONE)
        add(window)
        add(window, **values)
        add(window)
        with pytest.raises(UserError, match="loss or gradient is not finite at step 3 or shortly before") as error:
            window.collect(3)
        assert "rows" not in str(error.value), "it may have been the batch of another step"
