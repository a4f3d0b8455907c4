"""The learning rate of a step, and what is due after it."""

from __future__ import annotations

import math

import pytest

from sst2_xlmr.config import OPTIONS, Config
from sst2_xlmr.training.schedule import SCHEDULES, Schedule, evaluation_interval, lr_factor
from sst2_xlmr.training.state import TrainState


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
    assert [lr_factor(step, steps, warmup, schedule) for step in range(steps)] == pytest.approx(expected)


def test_every_schedule_that_can_be_asked_for_is_there_and_no_other_trains() -> None:
    check = OPTIONS["schedule"].metadata["check"]
    assert not any(check(name) for name in SCHEDULES)
    assert check("polynomial") == f"is not one of {', '.join(SCHEDULES)}"
    with pytest.raises(KeyError):
        lr_factor(5, 10, 0.0, "polynomial")


def state_at(step: int, batches: int = 10) -> TrainState:
    state = TrainState(batches)
    for _ in range(step):
        state.advance()
    return state


def test_what_is_due_follows_from_the_position() -> None:
    schedule = Schedule(Config(epochs=2, log_every=4, save_every=3), 10, eval_every=6)
    dues = [schedule.due(state_at(step)) for step in range(1, 21)]
    assert [step for step, due in enumerate(dues, 1) if "log" in due] == [4, 8, 12, 16, 20]
    assert [step for step, due in enumerate(dues, 1) if "evaluate" in due] == [6, 10, 16, 20]
    assert [step for step, due in enumerate(dues, 1) if "save" in due] == [3, 6, 9, 10, 12, 15, 18, 20]
    assert schedule.total_steps == 20
    assert [schedule.is_over(state_at(step)) for step in (19, 20)] == [False, True]


@pytest.mark.parametrize(
    ("batches", "train_tokens", "evaluated_tokens", "expected"),
    [
        (2105, 1_000_000, 22_000, 527),  # SST-2: four times, since eight would take 6 % of the time
        (31250, 20_000_000, 22_000, 3907),  # eight times
        (313, 150_000, 22_000, 0),  # a tenth of SST-2: only at the end of an epoch
        (5, 10_000_000, 100, 1),
    ],
)
def test_evaluations_are_about_eight_an_epoch_in_little_time(
    batches: int, train_tokens: int, evaluated_tokens: int, expected: int
) -> None:
    every = evaluation_interval(batches, train_tokens, evaluated_tokens)
    assert every == expected
    times = -(-batches // every) if every else 1
    assert times == 1 or times * evaluated_tokens <= 0.03 * 3 * train_tokens


@pytest.mark.parametrize(
    ("config", "steps"),
    [(Config(epochs=1), 313), (Config(epochs=2.5), 782), (Config(epochs=0.001), 1), (Config(max_steps=7), 7)],
)
def test_a_last_step_within_an_epoch_is_an_end_too(config: Config, steps: int) -> None:
    schedule = Schedule(config, 313, 0)
    assert schedule.total_steps == steps
    assert steps == 1 or not schedule.due(state_at(steps - 1, 313))
    assert schedule.due(state_at(steps, 313)) == {"log", "evaluate", "save"}


def test_patience_ends_a_run() -> None:
    schedule, state = Schedule(Config(early_stopping_patience=2), 10, 0), state_at(5)
    for accuracy, over in ((0.5, False), (0.5, False), (0.6, False), (0.6, False), (0.1, True)):
        assert schedule.may_end(state) == (state.stale_evaluations == 1)
        state.count_evaluation(accuracy)
        assert schedule.is_over(state) == over
    assert (state.best_value, state.best_step, state.evaluations) == (0.6, 5, 5)
