"""Duplicate training rows, conflicting labels, and texts that are also in evaluation files (leaks).

Texts are compared by 64-bit digests, which the token cache stores. The probability that any two of a million texts
collide is 3e-8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def text_digests(texts: Iterable[str], pairs: Iterable[str | None]) -> np.ndarray:
    """Return uint64 [rows], equal for rows with the same text (or pair of texts)."""
    whole = (text if pair is None else f"{text}\0{pair}" for text, pair in zip(texts, pairs))
    digests = [hashlib.blake2b(text.encode(), digest_size=8, usedforsecurity=False).digest() for text in whole]
    return np.frombuffer(b"".join(digests), np.uint64)


def find_repeats(digests: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row indices, int64, ascending, of repeats and of contradictions.

    A repeat has the text and label of an earlier row. Contradictions are all rows with a text that has other labels
    elsewhere in the file. Digests are uint64 [rows], labels int [rows].
    """
    order = np.lexsort((labels, digests))  # stable: among equals, the earlier row comes first
    same_text = digests[order][1:] == digests[order][:-1]
    same_label = labels[order][1:] == labels[order][:-1]
    repeats = order[1:][same_text & same_label]
    text = np.concatenate([[0], np.cumsum(~same_text)]) if len(order) else order  # text ids, in sorted order
    contradicted = np.zeros(len(order), bool)
    contradicted[text[1:][same_text & ~same_label]] = True
    return np.sort(repeats), np.sort(order[contradicted[text]])
