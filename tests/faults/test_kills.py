"""SIGKILL at random moments, again and again: what comes out is the run that nobody disturbed, bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from conftest import SAMPLE_DATA, train_options
from running import charted, digests, kill_group, last_step, launcher, logged, started

from sst2_xlmr.util.files import SCRATCH_MARK

STEPS = 200


def options(encoder: Path, data: Path, run: Path, precision: str) -> list[str]:
    """Dropout, accumulation, evaluations and checkpoints that fall on different steps, and an epoch of 7 steps."""
    return train_options(
        encoder,
        data,
        run,
        *("--max-steps", STEPS, "--precision", precision, "--micro-batch-size", 3, "--lr", 3e-4),
        *("--eval-every", 9, "--save-every", 5, "--test-file", SAMPLE_DATA / "test.de.tsv"),
    )


def run_with_kills(words: list[str], run: Path, kills: int, processes: int, seed: int) -> int:
    """Run to the end, and kill all processes at `kills` random moments; returns how many kills hit a running one."""
    chance = random.Random(seed)
    targets = sorted(chance.randrange(STEPS) for _ in range(kills))
    log = run.with_suffix(".log")
    hits = 0
    for target in [*targets, None]:
        resume = ["--resume"] if (run / "config.json").is_file() else []
        with started([*launcher(processes), "train.py", *words, *resume], log) as process:
            while process.poll() is None and (target is None or last_step(run) < target):
                time.sleep(0.002)
            if target is not None:
                time.sleep(chance.random() * 0.05)
                hits += process.poll() is None
                kill_group(process)
                continue
        assert process.returncode == 0, log.read_text()
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
    tiny_encoder: Path, small_data: Path, tmp_path: Path, precision: str, processes: int, kills: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_with_kills(options(tiny_encoder, small_data, whole, precision), whole, 0, processes, 0)
    words = options(tiny_encoder, small_data, broken, precision)
    assert run_with_kills(words, broken, kills, processes, seed=kills) >= kills * 0.8
    assert digests(broken) == digests(whole)
    assert logged(broken) == logged(whole)
    assert charted(broken) == charted(whole) == list(range(1, STEPS + 1))
    assert not list(broken.rglob(f"*{SCRATCH_MARK}"))
