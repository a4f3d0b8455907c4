"""Figures of several rounds: rounded, summarized, compared, and said on standard error."""

from __future__ import annotations

import statistics
import sys
from typing import Any

Answer = dict[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rounded(figure: float) -> float:
    """Round to five significant digits, or to a whole number."""
    return round(figure) if figure >= 10_000 else float(f"{figure:.5g}")


def spread(figures: list[float]) -> Answer:
    return {
        "median": rounded(statistics.median(figures)),
        "min": rounded(min(figures)),
        "max": rounded(max(figures)),
    }


def summarize(answers: list[Answer]) -> Answer:
    """Return the median, minimum and maximum over the rounds of every number; of all else the last round's."""
    last = answers[-1]
    spreads = {
        name: spread([answer[name] for answer in answers if name in answer])  # some are measured in the last round
        for name, value in last.items()
        if type(value) in (int, float)
    }
    bounds = {bound: {name: values[bound] for name, values in spreads.items()} for bound in ("min", "max")}
    return {**last, **{name: values["median"] for name, values in spreads.items()}, **bounds}


def ratio(ours: list[Answer], others: list[Answer], name: str = "samples_per_s") -> Answer:
    """Return median, minimum and maximum of the quotients, each of two figures of one round."""
    return spread([our[name] / other[name] for our, other in zip(ours, others)])


def report(number: int, rounds: int, what: str, answer: Answer) -> None:
    memory = answer["peak_rss_bytes"] / 2**30
    say(f"round {number + 1}/{rounds}: {what}: {answer['samples_per_s']:.1f} rows/s, {memory:.2f} GiB")
