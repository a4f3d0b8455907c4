"""A step's learning rate, and what is due after it: both follow from the position in the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sst2_xlmr.config import Config
from sst2_xlmr.training.state import Progress

# Fraction of the peak rate, given the fraction t of the steps after warm-up that have been taken, 0 <= t < 1.
# Those that fall reach 0 one step after the last, so that no step is taken at a rate of 0.
# To add one, add it here, and its name to --schedule in config.py.
SCHEDULES = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "constant": lambda t: 1.0,
}


MOST_EVALUATIONS, EVALUATION_SHARE = 8, 0.03  # per epoch, if nothing was asked for


def steps_of_warmup(total_steps: int, warmup_ratio: float) -> int:
    return math.ceil(total_steps * warmup_ratio)


def lr_factor(step: int, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """Return the learning rate of optimizer step `step` (from 0) as a fraction of the peak rate.

    Warm-up rises linearly and reaches 1 at its last step.
    """
    after_warmup = SCHEDULES[schedule]
    warmup_steps = steps_of_warmup(total_steps, warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return after_warmup((step - warmup_steps) / max(1, total_steps - warmup_steps))


def evaluation_interval(batches: int, train_tokens: int, evaluated_tokens: int) -> int:
    """Return after how many steps of an epoch to evaluate, if nothing was asked for; 0 for the end of epochs only.

    That is an eighth of an epoch, or longer, so that evaluations take at most 3 % of its time. In training, which
    has a backward pass, a token costs three times as much. It does not depend on any clock.

    Args:
        batches: global batches in an epoch.
        train_tokens: in an epoch.
        evaluated_tokens: in the files that are evaluated on.
    """
    times = min(MOST_EVALUATIONS, int(EVALUATION_SHARE * 3 * train_tokens / evaluated_tokens))
    return math.ceil(batches / times) if times > 1 else 0


@dataclass(frozen=True)
class Due:
    """What is due after a step."""

    log: bool
    evaluate: bool
    save: bool


class Schedule:
    """A run's schedule.

    Attributes:
        batches_per_epoch: global batches in an epoch.
        total_steps, warmup_steps: steps of the whole run, and those of warm-up among them.
    """

    def __init__(self, config: Config, batches_per_epoch: int) -> None:
        self._config = config
        self.batches_per_epoch = batches_per_epoch
        self.total_steps = config.max_steps or max(1, round(config.epochs * batches_per_epoch))
        self.warmup_steps = steps_of_warmup(self.total_steps, config.warmup_ratio)

    def lr(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0, before layer-wise decay."""
        config = self._config
        return config.lr * lr_factor(step, self.total_steps, config.warmup_ratio, config.schedule)

    def due(self, progress: Progress) -> Due:
        """Return what is due now that a step has been taken."""
        step, config = progress.step, self._config
        is_last = step == self.total_steps
        ends = progress.batch == 0 or is_last  # of an epoch, or of the run
        return Due(
            log=step % config.log_every == 0 or is_last,
            evaluate=ends or _is_multiple(progress.batch, config.eval_every or 0),
            save=ends or _is_multiple(step, config.save_every),
        )

    def has_stopped_improving(self, progress: Progress) -> bool:
        """Whether `--early-stopping-patience` ends the run: so many evaluations in a row without a better one."""
        return 0 < self._config.early_stopping_patience <= progress.stale_evaluations

    def is_over(self, progress: Progress) -> bool:
        """Whether no further step is to be taken."""
        return progress.step >= self.total_steps or self.has_stopped_improving(progress)


def _is_multiple(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens after this one."""
    return interval > 0 and step % interval == 0
