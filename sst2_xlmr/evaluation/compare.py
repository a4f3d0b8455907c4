"""Compare a faster precision with a reference: how many answers change, how much quality is lost, is that too much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import numpy as np

from sst2_xlmr.task import Task
from sst2_xlmr.util.errors import UserError

# By the name of a file: fp32 probabilities [rows, outputs] as computed, and those of the reference; labels, or None.
Predictions = Mapping[str, tuple[np.ndarray, np.ndarray, Optional[np.ndarray]]]


def compare(task: Task, found: np.ndarray, expected: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """Return how far two sides' probabilities agree.

    That is `rows`; how many answers `changed`; the `largest` change of a probability; both sides' `metrics`, or None.
    """
    metrics = None
    if labels is not None:
        metrics = [task.metrics(task.results_of(side, labels), labels) for side in (found, expected)]
        for each in metrics:
            del each["rows"]  # which stand beside both
    changed, largest = int(task.changed(found, expected).sum()), float(np.abs(found - expected).max())
    return {"rows": len(found), "changed": changed, "largest": largest, "metrics": metrics}


def compare_all(task: Task, files: Predictions) -> dict[str, Any]:
    """Compare the rows of all files together; with metrics only if all have labels."""
    found, expected = (np.concatenate([sides[which] for sides in files.values()]) for which in (0, 1))
    labels = [sides[2] for sides in files.values() if sides[2] is not None]
    return compare(task, found, expected, np.concatenate(labels) if len(labels) == len(files) else None)


def check_comparison(
    task: Task, files: Predictions, most_changed: float, most_lost: float, name: str, reference: str
) -> None:
    """Refuse a precision whose answers are too far from the reference's, by a UserError.

    At most a fraction `most_changed` of all rows may get another answer, and the task's main metric may fall by
    `most_lost`, on all labelled rows together.
    """
    part, cure = compare_all(task, files), f"are allowed; take {reference}, or allow more"
    if not np.isfinite(part["largest"]):
        raise UserError(f"{name} gives probabilities that are no numbers; take {reference}")
    if part["changed"] > most_changed * part["rows"]:
        labels = f"{part['changed']:,} of {part['rows']:,} labels of {reference}, {part['changed'] / part['rows']:.2%}"
        raise UserError(f"{name} changes {labels}, and at most {most_changed:.2%} {cure}")
    labelled = [part for part in (compare(task, *sides) for sides in files.values()) if part["metrics"]]
    rows = sum(part["rows"] for part in labelled)
    right = [sum(part["metrics"][side][task.best_metric] * part["rows"] for part in labelled) for side in (0, 1)]
    if right[1] - right[0] > most_lost * rows + 1e-6:  # in rows; sums of fractions are rounded
        lost = f"{(right[1] - right[0]) / rows:.2%} of {task.best_metric} against {reference}"
        raise UserError(f"{name} loses {lost}, and at most {most_lost:.2%} {cure}")
