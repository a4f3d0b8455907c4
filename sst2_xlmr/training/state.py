"""Where a run is: all of it is saved in a checkpoint, and is the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Where a run is, and what was decided for it."""

    batches_per_epoch: int
    precision: str = "fp32"  # as decided at the beginning, like the next one
    eval_every: int = 0
    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 of all that is read, the same after a resume
    step: int = 0  # global batches consumed; an optimizer step each, but for those that were skipped
    epoch: int = 0  # with `batch`, the position of the next global batch
    batch: int = 0
    best_value: float = float("-inf")  # of the best evaluation so far, by --best-by (higher is better)
    best_loss: float = float("inf")
    best_step: int = 0
    evaluations: int = 0  # on dev so far
    stale_evaluations: int = 0  # since the best one
    evaluation_due: bool = False  # the run was stopped before this step's evaluation was done
    skipped: int = 0  # batches whose gradient was not finite
    skipped_in_row: int = 0  # the most recent ones of them
    has_learned: bool = False  # a line of metrics was clearly better than the class-prior baseline
    collapse_check_due: bool = False  # the run seems not to learn
    checked_step: int = 0  # when that was checked last
    temperature: float = 1.0  # of the model that is written next, like all below (see evaluation/calibration)
    ece_before: float = 0.0
    ece_after: float = 0.0
    thresholds: list[float] = field(default_factory=list)  # of its labels, where they are fitted on dev

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
