"""How far a prediction is, on standard error."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60.0


class RowsBar:
    """A bar with the time left on a terminal, else a line a minute.

    Args:
        total: rows in all; 0 if that is not known, and then there are no lines.
        done: those of an earlier run.
    """

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        shows_bar = sys.stderr.isatty() and not quiet
        self._bar = tqdm(total=total or None, initial=done, unit=" rows", disable=not shows_bar, dynamic_ncols=True)
        self._says_lines = not shows_bar and not quiet and total > 0
        self._total, self._before, self._done = total, done, done
        self._started = self._said = time.monotonic()

    def advance(self, rows: int) -> None:
        self._done += rows
        self._bar.update(rows)
        now = time.monotonic()
        if self._says_lines and now - self._said > _SECONDS_BETWEEN_LINES:
            self._said, rate = now, (self._done - self._before) / (now - self._started)
            left = tqdm.format_interval((self._total - self._done) / rate)
            print(f"{self._done:,} of {self._total:,} rows, {rate:,.0f} rows/s, {left} left", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
