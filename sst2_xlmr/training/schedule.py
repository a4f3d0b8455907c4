"""A step's learning rate, and what is due after it: both follow from the position in the run."""

from __future__ import annotations

import math

from sst2_xlmr.config import Config
from sst2_xlmr.training.state import TrainState

# Fraction of the peak rate, given the fraction t of the steps after warm-up that have been taken, 0 <= t < 1.
# Those that fall reach 0 one step after the last, so that no step is taken at a rate of 0.
# To add one, add it here, and its name to --schedule in config.py.
SCHEDULES = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "constant": lambda t: 1.0,
}
MOST_EVALUATIONS, EVALUATION_SHARE = 8, 0.03  # per epoch, if nothing was asked for


def lr_factor(step: int, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """Return the rate of optimizer step `step` (from 0) as a fraction of the peak, reached at the last warm-up step."""
    after_warmup, warmup_steps = SCHEDULES[schedule], math.ceil(total_steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return after_warmup((step - warmup_steps) / max(1, total_steps - warmup_steps))


def evaluation_interval(batches: int, train_tokens: int, evaluated_tokens: int) -> int:
    """Return after how many steps of an epoch to evaluate, if nothing was asked for; 0 for the end of epochs only.

    That is an eighth of an epoch, or longer, so that evaluations take at most 3 % of its time. In training, which
    has a backward pass, a token costs three times as much. It does not depend on any clock. `batches` and
    `train_tokens` are those of an epoch.
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
        """Return the learning rate of step `step`, counted from 0, before layer-wise decay."""
        config = self._config
        return config.lr * lr_factor(step, self.total_steps, config.warmup_ratio, config.schedule)

    def due(self, state: TrainState) -> set[str]:
        """Return what is due now that a step has been taken: "log", "evaluate", "save"."""
        ends = self.ends(state)
        is_due = {
            "log": state.step % self._config.log_every == 0 or state.step == self.total_steps,
            "evaluate": ends or _is_multiple(state.batch, self._eval_every),
            "save": ends or _is_multiple(state.step, self._config.save_every),
        }
        return {what for what, due in is_due.items() if due}

    def ends(self, state: TrainState) -> bool:
        """Whether this step was the last one of an epoch, or of the run."""
        return state.batch == 0 or state.step == self.total_steps

    def may_end(self, state: TrainState) -> bool:
        """Whether the evaluation at this step may be the last one of the model as it is, so that more is reported."""
        return self.ends(state) or state.stale_evaluations + 1 == self._config.early_stopping_patience

    def has_stopped_improving(self, state: TrainState) -> bool:
        """Whether `--early-stopping-patience` ends the run: so many evaluations in a row without a better one."""
        return 0 < self._config.early_stopping_patience <= state.stale_evaluations

    def is_over(self, state: TrainState) -> bool:
        """Whether no further step is to be taken."""
        return state.step >= self.total_steps or self.has_stopped_improving(state)


def _is_multiple(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
