"""How far a prediction is, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60.0
Block = tuple[Sequence[Any], Any]


def with_progress(blocks: Iterable[Block], total: int, done: int, quiet: bool) -> Iterator[Block]:
    """Yield blocks, rows and what belongs to them; shows a bar with the time left on a terminal, else a line a minute.

    Of `total` rows, 0 if that is not known (and then there are no lines), `done` were done by an earlier run.
    """
    started = said = time.monotonic()
    rows = 0
    has_bar = sys.stderr.isatty() and not quiet
    with tqdm(total=total or None, initial=done, unit=" rows", disable=not has_bar, dynamic_ncols=True) as bar:
        for block in blocks:
            yield block
            rows += len(block[0])
            bar.update(len(block[0]))
            now = time.monotonic()
            if total and not has_bar and not quiet and now - said > _SECONDS_BETWEEN_LINES:
                said, rate = now, rows / (now - started)
                left = tqdm.format_interval((total - done - rows) / rate)
                print(f"{done + rows:,} of {total:,} rows, {rate:,.0f} rows/s, {left} left", file=sys.stderr)
