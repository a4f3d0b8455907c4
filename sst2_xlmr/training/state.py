"""Where a run is, and the sums since its last line of training metrics."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from sst2_xlmr.data.batches import RankBatch
from sst2_xlmr.util.distributed import World, shared_error, sum_over_ranks

_CURE = "lower --lr or raise --warmup-ratio in a new run, or --resume with --skip-nonfinite N"


@dataclass
class Progress:
    """Where a run is. All of it is saved in a checkpoint, and is the same on every rank.

    Attributes:
        train_digest, encoder_digest: SHA-256 of the training file and of the encoder's weights.
        batches_per_epoch: global batches in an epoch.
        step: global batches consumed; an optimizer step each, but for those that were passed over.
        epoch, batch: position of the next global batch.
        best_accuracy, best_step: of the best evaluation on dev so far.
        evaluations: on dev, so far.
        stale_evaluations: since the best one.
        evaluation_due: whether the run was stopped before this step's evaluation was done.
        skipped: batches passed over because their gradient was not finite.
        skipped_in_row: those among them that were the most recent batches.
        has_learned: whether a line of metrics was clearly better than a constant answer.
        look_due: whether dev's answers are to be looked at, because the run seems not to learn.
        checked_step: when that was done last.
        collapsed_step: when the run was seen to have collapsed (see training/collapse); 0 for never.
        restarts: how often it has begun again after that.
        calibration: temperature of the model that is written next, with ECE before and after; None if not asked for.
    """

    train_digest: str
    encoder_digest: str
    batches_per_epoch: int
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_accuracy: float = -1.0
    best_step: int = 0
    evaluations: int = 0
    stale_evaluations: int = 0
    evaluation_due: bool = False
    skipped: int = 0
    skipped_in_row: int = 0
    has_learned: bool = False
    look_due: bool = False
    checked_step: int = 0
    collapsed_step: int = 0
    restarts: int = 0
    calibration: tuple[float, float, float] | None = None

    @property
    def epochs(self) -> float:
        """Epochs done, with the fraction of the current one."""
        return self.epoch + self.batch / self.batches_per_epoch

    def advance(self) -> None:
        """Take note of an optimizer step, and go to the next global batch."""
        self.skipped_in_row = 0
        self._next()

    def pass_over(self, limit: int, rows: np.ndarray) -> None:
        """Go to the next global batch without a step, because this one's gradient is not finite.

        Args:
            limit: how many batches in a row may be passed over.
            rows: int [rows], numbers from 0 of the batch's training rows.

        Raises:
            UserError: on every rank, naming the rows, beyond the limit.
        """
        self.skipped += 1
        self.skipped_in_row += 1
        self._next()
        if self.skipped_in_row <= limit:
            return
        numbers = ", ".join(str(row + 1) for row in rows[:50]) + (", ..." if len(rows) > 50 else "")
        last = f" (the last of {self.skipped_in_row} in a row)" if self.skipped_in_row > 1 else ""
        raise shared_error(
            f"the gradient is not finite at step {self.step}{last}: {_CURE}; checkpoints are whole; training rows of"
            f" this batch, from 1: {numbers}"
        )

    def _next(self) -> None:
        self.step += 1
        self.batch += 1
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0

    def count_evaluation(self, accuracy: float) -> None:
        """Take note of a finished evaluation on dev at this step."""
        self.evaluations += 1
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.best_step, self.stale_evaluations = accuracy, self.step, 0
        else:
            self.stale_evaluations += 1
        self.evaluation_due = False


@dataclass
class Totals:
    """What a window has summed up over all ranks.

    Attributes:
        sums: of the training metrics over rows, by name: "loss" in nats, and what else `forward_backward` returns.
        rows, tokens: how many.
        seconds: of training.
        grad_norm: of the last gradient.
    """

    sums: dict[str, float] = field(default_factory=dict)
    rows: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    grad_norm: float = 0.0


class Window:
    """Sums over the steps since the last line of training metrics.

    Every rank adds up its own, without waiting for a GPU. `collect` brings them together and stops the clock, so that
    evaluating and saving do not count as training; `go_on` starts it again, from the totals on rank 0.

    Attributes:
        totals: over all ranks, as of the last `collect`.
    """

    def __init__(self, world: World) -> None:
        self.totals = Totals()
        self._world = world
        self.go_on()

    def go_on(self) -> None:
        """Continue from `totals`."""
        totals, device = self.totals, self._world.device
        rank_0 = 1.0 if self._world.is_main else 0.0  # the totals count once
        self._sums = {
            name: torch.tensor(total * rank_0, dtype=torch.float64, device=device)
            for name, total in totals.sums.items()
        }
        self._rows, self._tokens = totals.rows * rank_0, totals.tokens * rank_0
        self._norm = torch.tensor(totals.grad_norm, device=device)
        self._norm_sum = torch.zeros_like(self._norm)  # not finite, once any norm was not
        self._started = time.monotonic() - totals.seconds

    def add(self, sums: dict[str, torch.Tensor], norm: torch.Tensor, batch: RankBatch) -> None:
        """Add an optimizer step.

        Args:
            sums: of training metrics over this rank's rows, the same names on every rank; float64, no dimensions.
            norm: fp32, no dimensions; the gradient's.
        """
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._norm = norm
        self._norm_sum += norm
        self._rows += batch.rows
        self._tokens += batch.real_tokens

    def collect(self, step: int) -> None:
        """Sum up over all ranks.

        Raises:
            UserError: on every rank, if a loss or a gradient's norm was not finite; `step` is the last one added.
        """
        seconds = time.monotonic() - self._started
        counts = torch.tensor([self._rows, self._tokens], dtype=torch.float64, device=self._world.device)
        packed = torch.cat([counts, *(value.view(1) for value in self._sums.values())])
        rows, tokens, *sums = sum_over_ranks(self._world, packed).tolist()
        if not math.isfinite(sum(sums) + float(self._norm_sum)):
            raise shared_error(
                f"loss or gradient is not finite at step {step} or shortly before: {_CURE}, which looks at the gradient"
                " of every step; checkpoints are whole"
            )
        self.totals = Totals(dict(zip(self._sums, sums)), rows, tokens, seconds, float(self._norm))

    def close(self, progress: Progress, lr: float) -> dict[str, float]:
        """Return a line of training metrics, means over the window, and begin the next one.

        Args:
            lr: the rate of the last step.
        """
        totals, self.totals = self.totals, Totals(grad_norm=self.totals.grad_norm)
        return {
            "step": progress.step,
            "epoch": round(progress.epochs, 4),
            **{name: value / totals.rows for name, value in totals.sums.items()},
            "lr": lr,
            "grad_norm": totals.grad_norm,
            "samples_per_s": round(totals.rows / totals.seconds, 2),
            "tokens_per_s": round(totals.tokens / totals.seconds, 1),
        }
