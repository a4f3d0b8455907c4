"""The learning rate of a step, and the actions due after it; both follow from the position in the run."""

import math

from sst2_xlmr.config import Config
from sst2_xlmr.training.state import TrainState

# Fraction of the peak rate as a function of the fraction t of the steps after warm-up, 0 <= t < 1: 0 would be reached
# one step after the last. To add a schedule, add it here, and its name to --schedule in config.py.
SCHEDULES = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "constant": lambda t: 1.0,
}
MAX_EVALUATIONS, EVALUATION_FRACTION = 8, 0.03  # per epoch, without --eval-every


def evaluation_interval(batches: int, train_tokens: int, eval_tokens: int) -> int:
    """Return the steps between evaluations if --eval-every is not given; 0: only at the end of an epoch.

    It is an eighth of an epoch, or longer if evaluation would otherwise take more than 3 % of the time; a token in
    training is assumed to cost three times as much as in evaluation. No clock is involved.
    """
    evaluations = min(MAX_EVALUATIONS, int(EVALUATION_FRACTION * 3 * train_tokens / eval_tokens))
    return math.ceil(batches / evaluations) if evaluations > 1 else 0


class Schedule:
    """A run's schedule of `total_steps` steps, of which the first `warmup_steps` are warm-up."""

    def __init__(self, config: Config, batches_per_epoch: int, eval_every: int) -> None:
        self._config, self._eval_every = config, eval_every
        self.total_steps = config.max_steps or max(1, round(config.epochs * batches_per_epoch))
        self.warmup_steps = math.ceil(self.total_steps * config.warmup_ratio)

    def lr(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0) before layer-wise decay; warm-up ends at the peak rate."""
        config, after_warmup, warmup = self._config, SCHEDULES[self._config.schedule], self.warmup_steps
        if step < warmup:
            return config.lr * ((step + 1) / warmup)
        return config.lr * after_warmup((step - warmup) / max(1, self.total_steps - warmup))

    def due(self, state: TrainState) -> set[str]:
        """Return those of "log", "evaluation" and "checkpoint" that are due after the last step taken."""
        ends, eval_every, save_every = self.ends(state), self._eval_every, self._config.save_every
        is_due = {
            "log": state.step % self._config.log_every == 0 or state.step == self.total_steps,
            "evaluation": ends or (eval_every > 0 and state.batch % eval_every == 0),
            "checkpoint": ends or (save_every > 0 and state.step % save_every == 0),
        }
        return {action for action in is_due if is_due[action]}

    def ends(self, state: TrainState) -> bool:
        """Whether this step was the last of an epoch or of the run."""
        return state.batch == 0 or state.step == self.total_steps

    def may_be_last(self, state: TrainState) -> bool:
        """Whether the evaluation at this step may be the last one; then it is reported in full."""
        return self.ends(state) or state.stale_evaluations + 1 == self._config.early_stopping_patience

    def has_stopped_improving(self, state: TrainState) -> bool:
        """Whether `--early-stopping-patience` ends the run."""
        return 0 < self._config.early_stopping_patience <= state.stale_evaluations

    def is_over(self, state: TrainState) -> bool:
        """Whether the last step has been taken."""
        return state.step >= self.total_steps or self.has_stopped_improving(state)
