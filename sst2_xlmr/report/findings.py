"""The header's lines on rows that training had better not have."""

from __future__ import annotations

import numpy as np

from sst2_xlmr.data.formats import line_of
from sst2_xlmr.data.prepare import Prepared
from sst2_xlmr.util.errors import UserError


def findings(inputs: Prepared) -> list[str]:
    """Return a line each for repeated rows, contradictory labels and leaked texts, where there are any."""
    config, train = inputs.config, inputs.caches["train"]
    duplicates = "dropped" if config.drop_duplicates else "--drop-duplicates leaves them out"
    leaks = "dropped" if config.drop_leaks else "--drop-leaks leaves them out"
    lines = []
    if count := len(train.repeats):
        example = _example(inputs, ("train", train.repeats[0]))
        lines.append(f"repeated   {_rows(count)} text and label of an earlier one{example}; {duplicates}")
    if count := len(train.contradictions):
        first = train.contradictions[0]
        same = np.flatnonzero(train.text_digests == train.text_digests[first])
        other = next(row for row in same if train.labels[row] != train.labels[first])
        example = _example(inputs, ("train", first), ("train", other))
        lines.append(f"labels     {_rows(count)} a text with several labels{example}; {duplicates}")
    for split, rows in inputs.leaks.items():
        there = np.flatnonzero(inputs.caches[split].text_digests == train.text_digests[rows[0]])[0]
        example = _example(inputs, ("train", rows[0]), (split, there))
        lines.append(f"leaked     {_rows(len(rows))} a text of {split}{example}; {leaks}")
    return lines


def _rows(count: int) -> str:
    return f"{count:,} training rows have" if count > 1 else "1 training row has"


def _example(inputs: Prepared, *rows: tuple[str, int]) -> str:
    """Return the files and lines of rows, each with its split, after a comma.

    Nothing if a .csv file, which has to be read again for it, is not what it was: so a run can begin again after a
    collapse, long after it has read its files.
    """
    places = []
    for split, row in rows:
        file = inputs.files[split]
        try:
            places.append(f"{file.name}:{line_of(file, int(row), inputs.config.header)}")
        except (UserError, StopIteration):
            return ""
    return f", e.g. {' and '.join(places)}"
