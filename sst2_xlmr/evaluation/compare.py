"""A faster precision: how far its answers are from those of a reference, and whether that is too far."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sst2_xlmr.evaluation.metrics import calibration_error_of
from sst2_xlmr.util.errors import UserError


class Answers(NamedTuple):
    """A file's answers, twice.

    Attributes:
        found, expected: fp32 [rows, labels], probabilities as computed, and those of the reference.
        labels: int [rows]; None where the rows have none.
    """

    found: np.ndarray
    expected: np.ndarray
    labels: np.ndarray | None


class Quality(NamedTuple):
    """How good the answers of one side are: how many rows are right, and the calibration error."""

    right: int
    ece: float


class Agreement(NamedTuple):
    """How far they agree.

    Attributes:
        rows: how many.
        changed: how many get another label.
        largest: change of a probability.
        found, expected: of both sides; None without labels.
    """

    rows: int
    changed: int
    largest: float
    found: Quality | None
    expected: Quality | None


def compare(answers: Answers) -> Agreement:
    changed = int((answers.found.argmax(1) != answers.expected.argmax(1)).sum())
    largest = float(np.abs(answers.found - answers.expected).max())
    found, expected = _quality(answers.found, answers.labels), _quality(answers.expected, answers.labels)
    return Agreement(len(answers.found), changed, largest, found, expected)


def _quality(probabilities: np.ndarray, labels: np.ndarray | None) -> Quality | None:
    if labels is None:
        return None
    return Quality(int((probabilities.argmax(1) == labels).sum()), calibration_error_of(probabilities, labels))


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
        if part.found and part.expected:
            accuracy = f"{part.found.right / part.rows:.4f} ({part.expected.right / part.rows:.4f})"
            ece = f"{part.found.ece:.4f} ({part.expected.ece:.4f})"
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
    rows = lost = 0
    for part in map(compare, files.values()):
        if part.found and part.expected:
            rows, lost = rows + part.rows, lost + part.expected.right - part.found.right
    if lost > most_lost * rows:
        raise UserError(
            f"{name} loses {lost / rows:.2%} of accuracy against {reference}, and at most {most_lost:.2%} are allowed;"
            f" take {reference}, or allow more"
        )
