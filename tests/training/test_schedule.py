"""The learning rate of a step, what is due after it, and the sums behind a line of training metrics."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import ALONE

from sst2_xlmr.config import Config
from sst2_xlmr.data.batches import Batch
from sst2_xlmr.training.meter import TrainMeter
from sst2_xlmr.training.schedule import Schedule, evaluation_interval
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util.errors import UserError


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0.2, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("constant", 0.2, [0.5] + [1.0] * 9),
        ("cosine", 0.2, [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]),
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 1.0, [0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_schedule(schedule: str, warmup: float, expected: list[float]) -> None:
    steps = len(expected)
    found = Schedule(Config(lr=2.0, max_steps=steps, warmup_ratio=warmup, schedule=schedule), 100, 0)
    assert [found.lr(step) / 2 for step in range(steps)] == pytest.approx(expected)


def state_at(step: int, batches: int = 10) -> TrainState:
    state = TrainState(batches)
    for _ in range(step):
        state.advance()
    return state


def test_what_is_due_follows_from_the_position() -> None:
    schedule = Schedule(Config(epochs=2, log_every=4, save_every=3), 10, eval_every=6)
    dues = [schedule.due(state_at(step)) for step in range(1, 21)]
    assert [step for step, due in enumerate(dues, 1) if "log" in due] == [4, 8, 12, 16, 20]
    assert [step for step, due in enumerate(dues, 1) if "evaluation" in due] == [6, 10, 16, 20]
    assert [step for step, due in enumerate(dues, 1) if "checkpoint" in due] == [3, 6, 9, 10, 12, 15, 18, 20]
    assert [schedule.is_over(state_at(step)) for step in (19, 20)] == [False, True]


def test_evaluations_are_about_eight_an_epoch_in_little_time() -> None:
    assert evaluation_interval(2105, 1_000_000, 22_000) == 527, "SST-2: four times; eight would take 6 % of the time"
    assert evaluation_interval(31250, 20_000_000, 22_000) == 3907, "eight times"
    assert evaluation_interval(313, 150_000, 22_000) == 0, "a tenth of SST-2: only at the end of an epoch"
    assert evaluation_interval(313, 300_000, 22_000) == 0, "once, and that is the end"
    assert evaluation_interval(5, 10_000_000, 100) == 1


@pytest.mark.parametrize(
    ("config", "steps"),
    [(Config(epochs=1), 313), (Config(epochs=2.5), 782), (Config(epochs=0.001), 1), (Config(max_steps=7), 7)],
)
def test_a_last_step_within_an_epoch_is_an_end_too(config: Config, steps: int) -> None:
    schedule = Schedule(config, 313, 0)
    assert schedule.total_steps == steps
    assert steps == 1 or not schedule.due(state_at(steps - 1, 313))
    assert schedule.due(state_at(steps, 313)) == {"log", "evaluation", "checkpoint"}


def test_patience_ends_a_run() -> None:
    schedule, state = Schedule(Config(early_stopping_patience=2), 10, 0), state_at(5)
    for accuracy, over in ((0.5, False), (0.5, False), (0.6, False), (0.6, False), (0.1, True)):
        assert schedule.may_end(state) == (state.stale_evaluations == 1)
        state.count_evaluation(accuracy)
        assert schedule.is_over(state) == over
    assert (state.best_value, state.best_step, state.evaluations) == (0.6, 5, 5)


def add(meter: TrainMeter, loss: float = 2.0, norm: float = 0.5) -> None:
    """Add two rows of 9 tokens in all, and one row that is only computed to keep step with other ranks."""
    rows = Batch(torch.zeros(9), torch.tensor([4, 5]), torch.zeros(2), torch.zeros(2), 2)
    idle = Batch(torch.zeros(3), torch.tensor([3]), torch.zeros(1), torch.zeros(1), 2, weight=0.0)
    meter.add({"loss": torch.tensor(loss, dtype=torch.float64)}, torch.tensor(norm), [rows, idle])


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


@pytest.mark.parametrize(("what", "bad"), [("norm", math.inf), ("loss", math.nan)])
def test_what_is_not_finite_is_noticed_whatever_comes_after(what: str, bad: float) -> None:
    """A norm that overflows although every gradient is finite, and a loss whose gradient is finite."""
    meter = TrainMeter(ALONE)
    add(meter)
    add(meter, **{what: bad})
    add(meter)
    with pytest.raises(UserError, match="loss or gradient is not finite at step 3 or shortly before") as error:
        meter.reduce(3)
    assert "rows" not in str(error.value), "it may have been the batch of another step"
