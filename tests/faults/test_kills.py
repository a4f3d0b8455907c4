"""SIGKILL at random moments, again and again: what comes out is the run that nobody disturbed, bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from conftest import SAMPLE_DATA, Words
from running import charted, digests, forked_ranks, kill_group, last_step, logged, run_ranks

from sst2_xlmr.util.files import SCRATCH_MARK

STEPS = 60


def run_with_kills(words: list[str], run: Path, kills: int, processes: int) -> int:
    """Run to the end, and kill all processes at `kills` random moments; returns how many kills hit a running one."""
    chance = random.Random(1)
    hits = 0
    for target in sorted(chance.randrange(STEPS) for _ in range(kills)):
        resume = ["--resume"] if (run / "config.json").is_file() else []
        with forked_ranks(processes, ["train.py", *words, *resume], run.with_suffix(".log")) as forks:
            while forks[0].poll() is None and last_step(run) < target:
                time.sleep(0.002)
            time.sleep(chance.random() * 0.05)
            hits += forks[0].poll() is None
            for fork in forks:
                kill_group(fork)
    statuses, _, errors = run_ranks(processes, [*words, "--resume"], run.parent)
    assert set(statuses) == {0}, errors
    return hits


@pytest.mark.parametrize(
    ("precision", "processes", "kills"),
    [
        ("fp32", 1, 2),
        ("bf16", 2, 2),
        *(
            pytest.param(precision, processes, 20, marks=pytest.mark.slow)
            for precision in ("fp32", "bf16")
            for processes in (1, 2)
        ),
    ],
)
def test_killed_run_equals_undisturbed_run(
    train_words: Words, tmp_path: Path, precision: str, processes: int, kills: int
) -> None:
    """With dropout, accumulation, evaluations and checkpoints that fall on different steps, and an epoch of 7 steps."""
    options = ["--max-steps", STEPS, "--precision", precision, "--micro-batch-size", 3, "--lr", 3e-4]
    options += ["--eval-every", 9, "--save-every", 5, "--test-file", SAMPLE_DATA / "test.de.tsv"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert set(run_ranks(processes, train_words(whole, *options), tmp_path)[0]) == {0}
    words = train_words(broken, *options)
    assert run_with_kills(words, broken, kills, processes) >= kills * 0.8
    assert digests(broken) == digests(whole)
    assert logged(broken) == logged(whole)
    assert charted(broken) == charted(whole) == list(range(1, STEPS + 1))
    assert not list(broken.rglob(f"*{SCRATCH_MARK}"))
