"""Compare a faster precision with a reference: how many answers change, how much quality is lost, is that too much."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np

from sst2_xlmr.task import Task
from sst2_xlmr.util.errors import UserError

# By the name of a file: fp32 probabilities [rows, outputs] as computed, and those of the reference; labels, or None.
Predictions = dict[str, tuple[np.ndarray, np.ndarray, Optional[np.ndarray]]]


def compare(task: Task, found: np.ndarray, expected: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """Return how far two sides' probabilities agree.

    Returns:
        rows; changed, how many get another answer; largest, the largest change of a probability; metrics, those of
        both sides, None without labels.
    """
    metrics = None
    if labels is not None:
        metrics = [task.metrics(task.results_of(side, labels), labels) for side in (found, expected)]
        for each in metrics:
            del each["rows"]  # which stand beside both
    changed = int(task.changed(found, expected).sum())
    return {
        "rows": len(found),
        "changed": changed,
        "largest": float(np.abs(found - expected).max()),
        "metrics": metrics,
    }


def _all_rows(task: Task, files: Predictions) -> dict[str, Any]:
    """Compare the rows of all files together; with metrics only if all have labels."""
    found, expected = (np.concatenate([sides[which] for sides in files.values()]) for which in (0, 1))
    labels = [sides[2] for sides in files.values() if sides[2] is not None]
    return compare(task, found, expected, np.concatenate(labels) if len(labels) == len(files) else None)


def comparison_table(task: Task, files: Predictions, name: str, reference: str) -> list[str]:
    """Return the lines of a table: a file each, and all rows together if there are several files.

    Args:
        name, reference: what the two sides are called.
    """
    parts = {file: compare(task, *sides) for file, sides in files.items()}
    if len(parts) > 1:
        parts["all rows"] = _all_rows(task, files)
    rows = []
    for file, part in parts.items():
        share = f"{part['changed']:,} ({part['changed'] / part['rows']:.2%})"
        cells = {"file": file, "labels changed": share, "largest change": f"{part['largest']:.4f}"}
        if part["metrics"]:
            found, expected = map(task.table_cells, part["metrics"])
            cells.update({f"{key} {name} ({reference})": f"{found[key]} ({expected[key]})" for key in found})
        rows.append({**cells, "rows": f"{part['rows']:,}"})
    longest = max(rows, key=len)
    columns = dict(longest)  # a copy: the header is told from the rows by identity
    widths = {column: max(len(column), *(len(row.get(column, "-")) for row in rows)) for column in columns}
    lines = [columns, *rows]
    return [
        "  ".join(
            f"{cells.get(column, '-') if cells is not columns else column:{'<' if column == 'file' else '>'}{width}}"
            for column, width in widths.items()
        )
        for cells in lines
    ]


def check_comparison(
    task: Task, files: Predictions, most_changed: float, most_lost: float, name: str, reference: str
) -> None:
    """Refuse a precision whose answers are too far from the reference's.

    Args:
        most_changed: fraction of all rows that may get another label.
        most_lost: by how much the task's main metric may fall, on all labelled rows together.

    Raises:
        UserError: saying by how much a bound is passed.
    """
    part = _all_rows(task, files)
    if not np.isfinite(part["largest"]):
        raise UserError(f"{name} gives probabilities that are no numbers; take {reference}")
    if part["changed"] > most_changed * part["rows"]:
        raise UserError(
            f"{name} changes {part['changed']:,} of {part['rows']:,} labels of {reference},"
            f" {part['changed'] / part['rows']:.2%}, and at most {most_changed:.2%} are allowed; take {reference}, or"
            " allow more"
        )
    labelled = [part for part in (compare(task, *sides) for sides in files.values()) if part["metrics"]]
    rows = sum(part["rows"] for part in labelled)
    found, expected = (
        sum(part["metrics"][side][task.best_metric] * part["rows"] for part in labelled) for side in (0, 1)
    )
    if expected - found > most_lost * rows + 1e-6:  # in rows; sums of fractions are rounded
        raise UserError(
            f"{name} loses {(expected - found) / rows:.2%} of {task.best_metric} against {reference}, and at most"
            f" {most_lost:.2%} are allowed; take {reference}, or allow more"
        )
