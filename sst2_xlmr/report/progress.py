"""Progress of a prediction, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60.0
Block = tuple[Sequence[Any], Any]


def with_progress(blocks: Iterable[Block], total: int, done: int, quiet: bool) -> Iterator[Block]:
    """Yield blocks (rows, predictions); shows a bar on a terminal, otherwise prints a line per minute.

    Of `total` rows, an earlier run has done `done`.
    """
    started = printed = time.monotonic()
    rows, has_bar = 0, sys.stderr.isatty() and not quiet
    with tqdm(total=total, initial=done, unit=" rows", disable=not has_bar, dynamic_ncols=True) as bar:
        for block in blocks:
            yield block
            rows, now = rows + len(block[0]), time.monotonic()
            bar.update(len(block[0]))
            if not has_bar and not quiet and now - printed > _SECONDS_BETWEEN_LINES:
                printed, rate = now, rows / (now - started)
                left = tqdm.format_interval((total - done - rows) / rate)
                print(f"{done + rows:,} of {total:,} rows, {rate:,.0f} rows/s, {left} left", file=sys.stderr)
