"""Temperature scaling, which calibrates probabilities (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

Logits are divided by a temperature that minimizes the cross-entropy on labelled rows on which the model was not
trained; it stays at 1 unless another value is significantly better. No prediction changes. The logits come from a
linear layer, so its weights and bias are divided instead, and users of the model need not know.
"""

import numpy as np

from sst2_xlmr.task import Task

# A temperature beyond these bounds means that the rows are too few or too easy.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.25, 20.0
_STEPS = 40
# A temperature is significantly better than 1 if twice its gain in log-likelihood exceeds this: the 95th percentile of
# chi-squared with one degree of freedom (Wilks 1938, https://doi.org/10.1214/aos/1177732360).
_SIGNIFICANT_GAIN = 3.84


def calibrate(task: Task, probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """Return the temperature fitted to probabilities, float [rows, outputs], and their ECE before and after."""

    def results(inverse: float) -> np.ndarray:
        return task.results_of(probabilities, labels, 1 / inverse)

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    for _ in range(_STEPS):  # the loss is convex in the inverse temperature
        third = (high - low) / 3
        if results(low + third)[:, 0].mean() < results(high - third)[:, 0].mean():
            high -= third
        else:
            low += third
    inverse = (low + high) / 2
    before, after = (task.metrics(results(each), labels) for each in (1.0, inverse))
    if 2 * len(labels) * (before["loss"] - after["loss"]) <= _SIGNIFICANT_GAIN:
        return 1.0, before["ece"], before["ece"]
    return 1 / inverse, before["ece"], after["ece"]
