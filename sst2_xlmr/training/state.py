"""Where a run is: all of it is saved in a checkpoint, and is the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Where a run is, and what was decided for it.

    Attributes:
        precision, eval_every: as decided at the beginning.
        digests: SHA-256 of what the run reads; a resumed run must read the same.
        step: global batches consumed; an optimizer step each, but for those that were skipped.
        epoch, batch: position of the next global batch.
        best_value, best_loss, best_step: of the best evaluation so far, by --best-by (higher is better).
        evaluations, stale_evaluations: on dev so far, and since the best one.
        evaluation_due: whether the run was stopped before this step's evaluation was done.
        skipped, skipped_in_row: batches whose gradient was not finite; the most recent ones.
        has_learned: whether a line of metrics was clearly better than the class-prior baseline.
        collapse_check_due, checked_step: whether the run seems not to learn; when that was checked last.
        temperature, ece_before, ece_after: of the model that is written next (see evaluation/calibration).
        thresholds: of that model's labels, where they are fitted on dev.
    """

    batches_per_epoch: int
    precision: str = "fp32"
    eval_every: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_value: float = float("-inf")
    best_loss: float = float("inf")
    best_step: int = 0
    evaluations: int = 0
    stale_evaluations: int = 0
    evaluation_due: bool = False
    skipped: int = 0
    skipped_in_row: int = 0
    has_learned: bool = False
    collapse_check_due: bool = False
    checked_step: int = 0
    temperature: float = 1.0
    ece_before: float = 0.0
    ece_after: float = 0.0
    thresholds: list[float] = field(default_factory=list)

    @property
    def epochs(self) -> float:
        """Epochs done, with the fraction of the current one."""
        return self.epoch + self.batch / self.batches_per_epoch

    @property
    def updates(self) -> int:
        """Optimizer steps taken."""
        return self.step - self.skipped

    def advance(self, skipped: bool = False) -> None:
        """Go to the next global batch; this one was trained on, or skipped."""
        self.skipped += skipped
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        self.step += 1
        self.batch += 1
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0

    def is_best(self, value: float, loss: float = 0.0) -> bool:
        """Whether an evaluation is the best so far; the lower loss decides a tie."""
        return value > self.best_value or (value == self.best_value and loss < self.best_loss)

    def count_evaluation(self, value: float, loss: float = 0.0) -> None:
        """Count a finished evaluation at this step: the value that chooses the best, and dev's loss."""
        self.evaluations += 1
        if self.is_best(value, loss):
            self.best_value, self.best_loss, self.best_step, self.stale_evaluations = value, loss, self.step, 0
        else:
            self.stale_evaluations += 1
        self.evaluation_due = False
