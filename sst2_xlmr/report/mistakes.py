"""The table of a file's surest mistakes, in Markdown for TensorBoard."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sst2_xlmr.config import Config
from sst2_xlmr.data.rows import columns_of, read_rows
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of

MISTAKES = 50
LINE_LENGTH, MOST_LINES = 60, 5
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|&~]")


@dataclass(frozen=True)
class EvaluatedFile:
    """A labelled file that a model was evaluated on.

    Attributes:
        name: of the split, or what the user calls the file.
        path: where its texts are.
        cache: its rows, tokenized.
        config: its columns and classes.
    """

    name: str
    path: Path
    cache: TokenCache
    config: Config


def escape(text: str) -> str:
    """Return Markdown that shows the text as it is, cut if it is long.

    TensorBoard's tables break words of narrow columns in favour of a wide one, so the lines are broken here.
    """
    lines = textwrap.wrap(" ".join(text.split()), LINE_LENGTH) or [""]
    lines = [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1] + " ..."] if len(lines) > MOST_LINES else lines
    return "<br>".join(_MARKDOWN.sub(lambda match: f"&#{ord(match[0])};", line) for line in lines)


def _read_texts(file: EvaluatedFile, rows: set[int]) -> dict[int, str]:
    """Return the texts of some rows by their numbers; none if the file is no longer the one that was tokenized."""
    try:
        if digest_of(file.path) != file.cache.digest:
            return {}
        lines = enumerate(read_rows(file.path, columns_of(file.config), file.config.classes))
        chosen = ((row, line) for row, line in lines if row in rows)
        return {row: line.text if line.pair is None else f"{line.text} / {line.pair}" for row, line in chosen}
    except (OSError, UserError):  # it is being changed just now
        return {}


def mistakes_table(file: EvaluatedFile, probabilities: np.ndarray) -> str:
    """Return the mistakes that the model is surest of as a Markdown table; texts are read from the file.

    Args:
        probabilities: float32 [rows, labels].
    """
    labels, classes = file.cache.labels, [escape(name) for name in file.config.classes]
    predictions = probabilities.argmax(-1)
    wrong = np.flatnonzero(predictions != labels)
    confidences = probabilities[wrong, predictions[wrong]]
    chosen = wrong[np.argsort(-confidences, kind="stable")[:MISTAKES]].tolist()
    texts = _read_texts(file, set(chosen))
    lines = [f"{len(wrong):,} of {len(labels):,} rows are mistaken; of these the {len(chosen)} surest.", ""]
    lines += ["| row | text | true | predicted | probability |", "| ---: | --- | --- | --- | ---: |"]
    for row in chosen:
        label, prediction = int(labels[row]), int(predictions[row])
        text = escape(texts[row]) if row in texts else "(the file has changed)"
        probability = f"{probabilities[row, prediction]:.4f}"
        lines.append(f"| {row + 1} | {text} | {classes[label]} | {classes[prediction]} | {probability} |")
    return "\n".join(lines)
