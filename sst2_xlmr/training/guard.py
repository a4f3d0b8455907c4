"""Guards against collapse, and the fix for gradients that are not finite.

Collapse is XLM-R's best-known failure in fine-tuning, mostly at a learning rate too high for the seed: the encoder's
output no longer depends on its input, and the loss stays at the class-prior baseline. A run that merely learns slowly
still predicts differently for different texts.
"""

import math

import numpy as np

from sst2_xlmr.task import Task, stored_task
from sst2_xlmr.training.state import TrainState

NOT_FINITE_FIX = "lower --lr or raise --warmup-ratio in a new run, or --resume with --skip-nonfinite N"
# Check for a collapse if the mean logged loss is at least this fraction of the class-prior baseline, but not in the
# first steps after warm-up, nor soon after the last check.
_SUSPICIOUS_LOSS, _STEPS_TO_LEARN, _STEPS_BETWEEN_CHECKS = 0.98, 100, 100
# A run has learned once the mean loss, plus three standard errors, is below this fraction of the baseline.
_LEARNED_LOSS = 0.95
_LOSS_DEVIATION = 0.5  # assumed standard deviation of a row's loss, in nats: an upper estimate
# Collapsed if the std of the logits over texts is at most this fraction of its value before training. In six collapsed
# runs of the small encoder it was 0 to 0.16.
_COLLAPSED_STD = 0.3


def check_progress(state: TrainState, loss: float, rows: float, baseline: float, warmup_steps: int) -> None:
    """Update `has_learned` and `collapse_check_due` from the mean loss over `rows` rows; losses are in nats per row."""
    if loss + 3 * _LOSS_DEVIATION / math.sqrt(rows) < _LEARNED_LOSS * baseline:
        state.has_learned = True
    is_late = state.step - warmup_steps >= _STEPS_TO_LEARN
    is_late &= state.step - state.checked_step >= _STEPS_BETWEEN_CHECKS
    state.collapse_check_due = is_late and loss >= _SUSPICIOUS_LOSS * baseline


def collapse_reason(
    task: Task, probabilities: np.ndarray, untrained: np.ndarray, labels: np.ndarray, has_learned: bool
) -> str:
    """Return how dev's predictions show that training has collapsed; an empty string if they do not.

    Either every text gets the same prediction, and the logits vary over texts much less than before training; or the
    run had learned, and is now hardly better than a constant prediction, both in loss and by the task's metric: an
    overfitted model has a high loss, too. Probabilities are fp32 [rows, outputs], now and before the first step.
    """
    if len(np.unique(task.label_keys(labels))) == 1:
        return ""
    std, untrained_std = (task.logits_of(each).std(0).max() for each in (probabilities, untrained))
    prediction = task.constant_prediction(probabilities)
    if prediction and std <= _COLLAPSED_STD * untrained_std:
        return f"same prediction for every text of dev: {prediction}"
    loss = task.results_of(probabilities, labels)[:, 0].mean()
    baseline = stored_task(task.problem_type, task.label_names).baseline_loss(labels)  # without class weights
    if has_learned and loss >= _SUSPICIOUS_LOSS * baseline and task.is_near_constant_baseline(probabilities, labels):
        return "the model had learned, but is now hardly better than a constant prediction"
    return ""
