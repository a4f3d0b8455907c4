"""Several processes: one dies, one hangs, torchrun starts them again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import Capture, Words, user_error
from running import (
    DEADLINE_S,
    charted,
    digests,
    forked_ranks,
    launcher,
    logged,
    run_ranks,
    started,
    state_of,
    wait_for,
    workers,
)

from sst2_xlmr import train
from sst2_xlmr.util import distributed

STEPS = 100


OPTIONS = ["--max-steps", STEPS, "--save-every", 10]


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_others_end_when_one_dies_or_hangs(train_words: Words, tmp_path: Path, rank: int, number: int) -> None:
    """One that hangs counts as lost after the timeout."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["train.py", *train_words(run, "--save-every", 10, "--timeout-minutes", 0.1, "--max-steps", 5000)]
    with forked_ranks(2, words, log) as forks:
        wait_for(log, "step ", forks[0], times=30)
        forks[rank].send_signal(number)
        assert forks[1 - rank].wait() == 1
    said = log.read_text()
    assert f"error: rank {1 - rank}: lost contact with another process (" in said
    assert "gave no answer for 0.1 minutes" in said and "continue with --resume" in said
    assert "Traceback" not in said
    assert state_of(run).step >= 10


def test_rank_0_waits_for_one_that_hangs_no_longer_than_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(_: list[str]) -> None:
        with distributed.start("cpu", 1, 0.05) as world:
            distributed.on_rank0(world, lambda: time.sleep(4))  # a slow disk: the other waits longer than the timeout
            time.sleep(60 * world.rank)
            distributed.on_rank0(world, lambda: None)

    monkeypatch.setattr(train, "main", late)
    with forked_ranks(2, ["train.py"], tmp_path / "log") as forks:
        wait_for(tmp_path / "log", "error: rank 0: lost contact with another process (Operation timed out", forks[1])


def test_torchrun_restarts_and_the_result_is_exact(train_words: Words, tmp_path: Path) -> None:
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert run_ranks(2, train_words(whole, *OPTIONS), tmp_path)[0] == [0, 0]
    words = [*launcher(2, "--max-restarts=3"), "train.py", *train_words(run, *OPTIONS)]
    with started(words, log) as process:
        for times, rank in ((30, 1), (60, 0)):
            wait_for(log, "step ", process, times=times)
            os.kill(workers(process)[rank], signal.SIGKILL)
            wait_for(log, "resume     from", process, times=2 if rank == 0 else 1)
        assert process.wait(DEADLINE_S) == 0, log.read_text()
    assert digests(run) == digests(whole)
    assert logged(run) == logged(whole)
    assert charted(run) == list(range(1, STEPS + 1))


def test_restarts_need_a_folder_to_come_back_to(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    line = user_error(lambda: train.main(["--device", "cpu"]), capsys)
    assert "torchrun --max-restarts needs --output-dir" in line
