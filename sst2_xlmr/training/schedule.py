"""A step's learning rate, and what is due after it: both follow from the position in the run."""

from __future__ import annotations

import math

from sst2_xlmr.config import Config
from sst2_xlmr.training.state import TrainState

# Fraction of the peak rate, given the fraction t of the steps after warm-up that have been taken, 0 <= t < 1; 0 is
# reached one step after the last. To add one, add it here, and its name to --schedule in config.py.
SCHEDULES = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "constant": lambda t: 1.0,
}
MOST_EVALUATIONS, EVALUATION_SHARE = 8, 0.03  # per epoch, if nothing was asked for


def evaluation_interval(batches: int, train_tokens: int, evaluated_tokens: int) -> int:
    """Return after how many steps of an epoch to evaluate, if nothing was asked for; 0 for the end of epochs only.

    That is an eighth of an epoch of so many batches and tokens, or longer, so that evaluations take at most 3 % of its
    time, where a token costs three times as much in training. It does not depend on any clock.
    """
    times = min(MOST_EVALUATIONS, int(EVALUATION_SHARE * 3 * train_tokens / evaluated_tokens))
    return math.ceil(batches / times) if times > 1 else 0


class Schedule:
    """A run's schedule, of `total_steps`, the first `warmup_steps` of which warm up; with `eval_every` as decided."""

    def __init__(self, config: Config, batches_per_epoch: int, eval_every: int) -> None:
        self._config, self._eval_every = config, eval_every
        self.total_steps = config.max_steps or max(1, round(config.epochs * batches_per_epoch))
        self.warmup_steps = math.ceil(self.total_steps * config.warmup_ratio)

    def lr(self, step: int) -> float:
        """Return the rate of step `step`, from 0, before layer-wise decay; the last step of warm-up has the peak."""
        config, after_warmup, warmup = self._config, SCHEDULES[self._config.schedule], self.warmup_steps
        if step < warmup:
            return config.lr * ((step + 1) / warmup)
        return config.lr * after_warmup((step - warmup) / max(1, self.total_steps - warmup))

    def due(self, state: TrainState) -> set[str]:
        """Return which of "log", "evaluation" and "checkpoint" are due now that a step has been taken."""
        ends, eval_every, save_every = self.ends(state), self._eval_every, self._config.save_every
        is_due = {
            "log": state.step % self._config.log_every == 0 or state.step == self.total_steps,
            "evaluation": ends or (eval_every > 0 and state.batch % eval_every == 0),
            "checkpoint": ends or (save_every > 0 and state.step % save_every == 0),
        }
        return {what for what in is_due if is_due[what]}

    def ends(self, state: TrainState) -> bool:
        """Whether this step was the last one of an epoch, or of the run."""
        return state.batch == 0 or state.step == self.total_steps

    def may_end(self, state: TrainState) -> bool:
        """Whether the evaluation at this step may be the last one, so that more is reported."""
        return self.ends(state) or state.stale_evaluations + 1 == self._config.early_stopping_patience

    def has_stopped_improving(self, state: TrainState) -> bool:
        """Whether `--early-stopping-patience` ends the run."""
        return 0 < self._config.early_stopping_patience <= state.stale_evaluations

    def is_over(self, state: TrainState) -> bool:
        """Whether no further step is to be taken."""
        return state.step >= self.total_steps or self.has_stopped_improving(state)
