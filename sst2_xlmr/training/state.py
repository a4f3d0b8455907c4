"""A run's position and decisions: all of it is saved in checkpoints, and the same on every rank."""

from dataclasses import dataclass, field


@dataclass
class TrainState:
    batches_per_epoch: int
    precision: str = "fp32"  # never auto
    eval_every: int = 0  # as `evaluation_interval` returns it
    digests: dict[str, str] = field(default_factory=dict)  # input -> SHA-256
    step: int = 0  # global batches consumed, including skipped ones
    epoch: int = 0  # with `batch`, the position of the next global batch
    batch: int = 0
    best_score: float = float("-inf")  # best evaluation so far, by --best-by (higher is better)
    best_loss: float = float("inf")
    best_step: int = 0
    evaluations: int = 0
    stale_evaluations: int = 0  # since the best one
    evaluation_due: bool = False  # this step's evaluation has not finished
    skipped: int = 0  # batches whose gradient was not finite, so that no optimizer step was taken
    skipped_in_row: int = 0  # consecutive ones, up to now
    has_learned: bool = False  # the logged loss was once clearly below the class-prior baseline
    collapse_check_due: bool = False
    checked_step: int = 0  # of the last check for a collapse
    temperature: float = 1.0  # like the two below: as of the last model written, fitted on dev
    ece_before: float = 0.0  # expected calibration error at temperature 1
    ece_after: float = 0.0
    thresholds: list[float] = field(default_factory=list)  # of the labels, fitted on dev in the last evaluation

    def advance(self, skipped: bool = False) -> None:
        """Move to the next global batch."""
        self.skipped += skipped
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        self.step += 1
        self.batch += 1
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0

    def is_best(self, score: float, loss: float = 0.0) -> bool:
        """Whether an evaluation is the best so far; ties go to the lower loss."""
        return score > self.best_score or (score == self.best_score and loss < self.best_loss)

    def count_evaluation(self, score: float, loss: float = 0.0) -> None:
        """Record a finished evaluation: its score by --best-by (higher is better), and dev's loss."""
        self.evaluations += 1
        if self.is_best(score, loss):
            self.best_score, self.best_loss, self.best_step, self.stale_evaluations = score, loss, self.step, 0
        else:
            self.stale_evaluations += 1
        self.evaluation_due = False
