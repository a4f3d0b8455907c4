"""Rows that training had better not have: repeated ones, contradictions, texts of the files to evaluate on.

Texts are compared by digests of 64 bits, kept in the token cache. Among a million different texts, two have the same
digest with a probability of 3e-8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def text_digests(texts: Iterable[str], pairs: Iterable[str | None]) -> np.ndarray:
    """Return uint64 [rows], equal for rows with the same text and the same second text, or none."""
    whole = (text if pair is None else f"{text}\0{pair}" for text, pair in zip(texts, pairs))
    digests = [hashlib.blake2b(text.encode(), digest_size=8, usedforsecurity=False).digest() for text in whole]
    return np.frombuffer(b"".join(digests), np.uint64)


def find_repeats(digests: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 arrays of row numbers, ascending: repeats and contradictions.

    A repeat has text and label of an earlier row. A contradiction is a row whose text has another label elsewhere in
    the file; all rows of such a text are. Digests are uint64 [rows], labels int [rows].
    """
    order = np.lexsort((labels, digests))  # stable: among equals, the earlier row comes first
    same_text = digests[order][1:] == digests[order][:-1]
    same_label = labels[order][1:] == labels[order][:-1]
    repeats = order[1:][same_text & same_label]
    text = np.concatenate([[0], np.cumsum(~same_text)]) if len(order) else order  # numbered in that order
    contradicted = np.zeros(len(order), bool)
    contradicted[text[1:][same_text & ~same_label]] = True
    return np.sort(repeats), np.sort(order[contradicted[text]])


def find_leaks(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return int64 row numbers, ascending, of the texts in `digests` that are also in `others`; both uint64."""
    return np.flatnonzero(np.isin(digests, others))
