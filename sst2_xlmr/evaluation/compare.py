"""Compare a faster precision with a reference: changed predictions, lost accuracy, and the bounds on both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import numpy as np

from sst2_xlmr.task import Task
from sst2_xlmr.util.errors import UserError

# File name -> (fp32 probabilities [rows, outputs], the reference's, labels or None).
Predictions = Mapping[str, tuple[np.ndarray, np.ndarray, Optional[np.ndarray]]]


def compare(task: Task, actual: np.ndarray, expected: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """Return `rows`, `changed` predictions, `largest` change of a probability, and both sides' `metrics` or None."""
    metrics = None
    if labels is not None:
        metrics = [task.metrics(task.results_of(side, labels), labels) for side in (actual, expected)]
        for side_metrics in metrics:
            del side_metrics["rows"]
    changed, largest = int(task.changed(actual, expected).sum()), float(np.abs(actual - expected).max())
    return {"rows": len(actual), "changed": changed, "largest": largest, "metrics": metrics}


def compare_all(task: Task, files: Predictions) -> dict[str, Any]:
    """Compare the rows of all files together; `metrics` is None unless all have labels."""
    actual, expected = (np.concatenate([sides[which] for sides in files.values()]) for which in (0, 1))
    labels = [sides[2] for sides in files.values() if sides[2] is not None]
    return compare(task, actual, expected, np.concatenate(labels) if len(labels) == len(files) else None)


def check_comparison(
    task: Task, files: Predictions, most_changed: float, most_lost: float, name: str, reference: str
) -> None:
    """Raise UserError if a precision's predictions differ too much from the reference's.

    At most a fraction `most_changed` of all predictions may change, and the task's main metric, averaged over all
    labelled rows, may fall by at most `most_lost`.
    """
    total, cure = compare_all(task, files), f"are allowed; use {reference}, or allow more"
    if not np.isfinite(total["largest"]):
        raise UserError(f"{name} produces probabilities that are not finite; use {reference}")
    changed, rows = total["changed"], total["rows"]
    if changed > most_changed * rows:
        share = f"{changed:,} of {rows:,} labels of {reference}, {changed / rows:.2%}"
        raise UserError(f"{name} changes {share}, and at most {most_changed:.2%} {cure}")
    labelled = [part for part in (compare(task, *sides) for sides in files.values()) if part["metrics"]]
    rows = sum(part["rows"] for part in labelled)
    sums = [sum(part["metrics"][side][task.best_metric] * part["rows"] for part in labelled) for side in (0, 1)]
    if sums[1] - sums[0] > most_lost * rows + 1e-6:  # in rows; sums of fractions are rounded
        lost = f"{(sums[1] - sums[0]) / rows:.2%} of {task.best_metric} against {reference}"
        raise UserError(f"{name} loses {lost}, and at most {most_lost:.2%} {cure}")
