"""Compare a faster precision with a reference: changed predictions, lost accuracy, and the bounds on both."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sst2_xlmr.task import Task
from sst2_xlmr.util.errors import UserError

# File name -> (fp32 probabilities [rows, outputs], the reference's, labels or None).
Predictions = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]]
Comparisons = dict[str, dict[str, Any]]  # by name of file; see `compare_files`


def compare(task: Task, actual: np.ndarray, expected: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """Return `rows`, `changed` predictions, `largest` change of a probability, and both sides' `metrics` or None."""
    metrics = None
    if labels is not None:
        metrics = [task.metrics(task.results_of(side, labels), labels) for side in (actual, expected)]
        for side_metrics in metrics:
            del side_metrics["rows"]
    changed, largest = int(task.is_prediction_changed(actual, expected).sum()), float(np.abs(actual - expected).max())
    return {"rows": len(actual), "changed": changed, "largest": largest, "metrics": metrics}


def compare_files(task: Task, files: Predictions) -> Comparisons:
    """Compare each file and, last, "all rows" of several, whose `metrics` are None unless all files have labels."""
    found = {name: compare(task, *sides) for name, sides in files.items()}
    if len(files) > 1:
        actual, expected = (np.concatenate([sides[which] for sides in files.values()]) for which in (0, 1))
        labels = [sides[2] for sides in files.values() if sides[2] is not None]
        all_labels = np.concatenate(labels) if len(labels) == len(files) else None
        found["all rows"] = compare(task, actual, expected, all_labels)
    return found


def check_comparison(
    task: Task, compared: Comparisons, most_changed: float, most_lost: float, name: str, reference: str
) -> None:
    """Raise UserError if a precision's predictions differ too much from the reference's.

    At most a fraction `most_changed` of all predictions may change, and the task's main metric, averaged over all
    labelled rows, may fall by at most `most_lost`.
    """
    *_, total = compared.values()
    if not np.isfinite(total["largest"]):
        raise UserError(f"{name} produces probabilities that are not finite; use {reference}")
    changed, rows = total["changed"], total["rows"]
    if changed > most_changed * rows:
        extent = f"{changed:,} of {rows:,} labels of {reference}, {changed / rows:.2%} (limit {most_changed:.2%})"
        raise UserError(f"{name} changes {extent}; use {reference}, or raise --most-changed")
    labelled = [part for file, part in compared.items() if part["metrics"] and file != "all rows"]
    rows = sum(part["rows"] for part in labelled)
    sums = [sum(part["metrics"][side][task.best_metric] * part["rows"] for part in labelled) for side in (0, 1)]
    if sums[1] - sums[0] > most_lost * rows + 1e-6:  # in rows; sums of fractions are rounded
        lost = f"{(sums[1] - sums[0]) / rows:.2%} of {task.best_metric} against {reference} (limit {most_lost:.2%})"
        raise UserError(f"{name} loses {lost}; use {reference}, or raise --most-lost")
