"""The gate of a faster precision: how far its answers are from a reference, and whether that is too far."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sst2_xlmr.errors import UserError
from sst2_xlmr.evaluation.metrics import calibration_sums, expected_calibration_error


class Answers(NamedTuple):
    """A file's answers, twice.

    Attributes:
        found, expected: fp32 [rows, labels], probabilities as computed, and those of the reference.
        labels: int [rows]; None where the rows have none.
    """

    found: np.ndarray
    expected: np.ndarray
    labels: np.ndarray | None


class Agreement(NamedTuple):
    """How far they agree.

    Attributes:
        rows: how many.
        changed: how many get another label.
        largest: change of a probability.
        right, expected_right: how many are right, found and expected; None without labels.
        ece, expected_ece: calibration error; None without labels.
    """

    rows: int
    changed: int
    largest: float
    right: int | None
    expected_right: int | None
    ece: float | None
    expected_ece: float | None


def compare(answers: Answers) -> Agreement:
    found, expected = answers.found.argmax(1), answers.expected.argmax(1)
    changed, rows = int((found != expected).sum()), len(found)
    largest = float(np.abs(answers.found - answers.expected).max())
    if answers.labels is None:
        return Agreement(rows, changed, largest, None, None, None, None)
    figures: list[float] = []
    for probabilities, predictions in ((answers.found, found), (answers.expected, expected)):
        is_right = predictions == answers.labels
        figures += [int(is_right.sum())]
        figures += [expected_calibration_error(calibration_sums(probabilities.max(1), is_right), rows)]
    right, ece, expected_right, expected_ece = figures
    return Agreement(rows, changed, largest, int(right), int(expected_right), ece, expected_ece)


def _joined(files: dict[str, Answers]) -> Answers:
    """Return the answers to the rows of all files; labels only if all have them."""
    labels = [answers.labels for answers in files.values() if answers.labels is not None]
    return Answers(
        np.concatenate([answers.found for answers in files.values()]),
        np.concatenate([answers.expected for answers in files.values()]),
        np.concatenate(labels) if len(labels) == len(files) else None,
    )


def agreement_table(files: dict[str, Answers], name: str, reference: str) -> list[str]:
    """Return the lines of a table: a file each, and all rows together if there are several files.

    Args:
        name, reference: what the two sides are called.
    """
    parts = {file: compare(answers) for file, answers in files.items()}
    if len(parts) > 1:
        parts["all rows"] = compare(_joined(files))
    width = max(len(file) for file in (*parts, "file"))
    sides = f"{name} ({reference})"
    lines = [
        f"{'file':<{width}}  labels changed  largest change  {'accuracy ' + sides:>26}  {'ECE ' + sides:>26}      rows"
    ]
    for file, part in parts.items():
        accuracy = ece = "-"
        if part.right is not None and part.expected_right is not None:
            accuracy = f"{part.right / part.rows:.4f} ({part.expected_right / part.rows:.4f})"
            ece = f"{part.ece:.4f} ({part.expected_ece:.4f})"
        share = f"{part.changed:,} ({part.changed / part.rows:.2%})"
        lines.append(f"{file:<{width}}  {share:>14}  {part.largest:>14.4f}  {accuracy:>26}  {ece:>26}  {part.rows:>8,}")
    return lines


def check_agreement(
    files: dict[str, Answers], most_changed: float, most_lost: float, name: str, reference: str
) -> None:
    """Refuse answers that are too far from the reference.

    Args:
        most_changed: fraction of all rows that may get another label.
        most_lost: by how much the accuracy on all labelled rows may fall.

    Raises:
        UserError: saying by how much a bound is passed.
    """
    part = compare(_joined(files))
    if not np.isfinite(part.largest):
        raise UserError(f"{name} gives probabilities that are no numbers; take {reference}")
    if part.changed > most_changed * part.rows:
        raise UserError(
            f"{name} changes {part.changed:,} of {part.rows:,} labels of {reference}, {part.changed / part.rows:.2%},"
            f" and at most {most_changed:.2%} are allowed; take {reference}, or allow more"
        )
    labelled = [compare(answers) for answers in files.values() if answers.labels is not None]
    rows, lost = sum(part.rows for part in labelled), sum((p.expected_right or 0) - (p.right or 0) for p in labelled)
    if lost > most_lost * rows:
        raise UserError(
            f"{name} loses {lost / rows:.2%} of accuracy against {reference}, and at most {most_lost:.2%} are allowed;"
            f" take {reference}, or allow more"
        )
