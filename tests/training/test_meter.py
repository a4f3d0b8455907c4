"""The sums behind a line of training metrics."""

from __future__ import annotations

import math

import pytest
import torch

from sst2_xlmr.data.batches import Batch
from sst2_xlmr.training.guard import NotFinite
from sst2_xlmr.training.meter import TrainMeter
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util.distributed import World

ALONE = World.alone(torch.device("cpu"))
BATCHES = [  # two rows of 9 tokens in all; one row that is only computed to keep step with other ranks
    Batch(torch.zeros(9), torch.tensor([4, 5]), torch.zeros(2), torch.zeros(2), 2),
    Batch(torch.zeros(3), torch.tensor([3]), torch.zeros(1), torch.zeros(1), 2, weight=0.0),
]


def add(meter: TrainMeter, loss: float = 2.0, norm: float = 0.5) -> None:
    meter.add({"loss": torch.tensor(loss, dtype=torch.float64)}, torch.tensor(norm), BATCHES)


def test_means_since_the_last_line() -> None:
    meter = TrainMeter(ALONE)
    add(meter)
    add(meter, 4.0, 0.25)
    meter.reduce(2)
    assert [meter.totals[name] for name in ("rows", "tokens", "loss")] == [4, 18, 6]
    meter.totals["seconds"] = 2.0
    means = {"step": 2, "epoch": 0.2, "loss": 1.5, "lr": 0.1, "grad_norm": 0.25}
    speeds = {"samples_per_s": 2.0, "tokens_per_s": 9.0}
    assert meter.flush(TrainState(10, step=2, batch=2), lr=0.1) == {**means, **speeds}
    assert meter.totals == {"grad_norm": 0.25}


def test_what_was_saved_goes_on() -> None:
    """Its gradient's norm too, if the next line comes before another step, as after a batch that was skipped."""
    meter, resumed = TrainMeter(ALONE), TrainMeter(ALONE)
    add(meter, norm=0.75)
    meter.reduce(1)
    resumed.totals = dict(meter.totals)
    resumed.start()
    resumed.reduce(1)
    assert resumed.flush(TrainState(10, step=1), 0.1)["grad_norm"] == 0.75
    resumed.start()
    add(resumed, 3.0)
    resumed.reduce(2)
    assert resumed.flush(TrainState(10, step=2), 0.1)["loss"] == 1.5, "the line before is not in it"


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("what", ["norm", "loss"])
def test_what_is_not_finite_is_noticed_whatever_comes_after(what: str, bad: float) -> None:
    """A norm that overflows although every gradient is finite, and a loss whose gradient is finite."""
    meter = TrainMeter(ALONE)
    add(meter)
    add(meter, **{what: bad})
    add(meter)
    with pytest.raises(NotFinite, match="loss or gradient is not finite at step 3 or shortly before") as error:
        meter.reduce(3)
    assert "rows" not in str(error.value), "it may have been the batch of another step"
