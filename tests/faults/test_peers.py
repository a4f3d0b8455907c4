"""Several processes: one dies, one hangs, torchrun starts them again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import ROOT, train_options
from running import DEADLINE_S, charted, digests, launcher, logged, started, wait_for, workers

from sst2_xlmr.training.checkpoint import find_checkpoint

STEPS = 150


def options(encoder: Path, data: Path, run: Path, *more: object) -> list[str]:
    return ["train.py", *train_options(encoder, data, run, "--max-steps", STEPS, "--save-every", 10, *more)]


@pytest.mark.parametrize("rank", [0, 1])
def test_others_end_when_one_dies(tiny_encoder: Path, small_data: Path, tmp_path: Path, rank: int) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with started([*launcher(2), *options(tiny_encoder, small_data, run)], log) as process:
        wait_for(log, "step ", process, times=30)
        os.kill(workers(process)[rank], signal.SIGKILL)
        assert process.wait(timeout=DEADLINE_S) == 1
    said = log.read_text()
    assert f"error: rank {1 - rank}: lost contact with another process (" in said
    assert "continue with --resume" in said
    assert "File " not in said.split("lost contact")[1].split("torch/distributed/elastic")[0], "no traceback of ours"
    assert find_checkpoint(run / "checkpoints", pytest.fail) is not None


def test_one_that_hangs_counts_as_lost_after_the_timeout(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = options(tiny_encoder, small_data, run, "--timeout-minutes", 0.1)
    with started([*launcher(2), *words], log) as process:
        wait_for(log, "step ", process, times=30)
        os.kill(workers(process)[1], signal.SIGSTOP)  # it is never resumed: only the timeout can end this
        wait_for(log, "error: rank 0: lost contact with another process", process)
    assert "gave no answer for 0.1 minutes" in log.read_text()
    assert find_checkpoint(run / "checkpoints", pytest.fail) is not None


LATE = """
import sys, time
from sst2_xlmr.util import distributed
from sst2_xlmr.util.errors import exit_on_user_error

def main():
    with distributed.start("cpu", 1, 0.05) as world:
        distributed.on_rank0(world, lambda: time.sleep(5))  # a slow disk: the other waits longer than the timeout
        time.sleep(60 * world.rank)
        distributed.on_rank0(world, lambda: None)

exit_on_user_error(main)
"""


def test_rank_0_waits_for_one_that_hangs_no_longer_than_the_timeout(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{LATE}")
    with started([*launcher(2), str(tmp_path / "late.py")], tmp_path / "log") as process:
        wait_for(tmp_path / "log", "error: rank 0: lost contact with another process (Operation timed out", process)


def test_torchrun_restarts_and_the_result_is_exact(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    with started([*launcher(2), *options(tiny_encoder, small_data, whole)], log) as process:
        assert process.wait() == 0, log.read_text()
    log.unlink()
    with started([*launcher(2, "--max-restarts=3"), *options(tiny_encoder, small_data, run)], log) as process:
        for times, rank in ((30, 1), (80, 0)):
            wait_for(log, "step ", process, times=times)
            os.kill(workers(process)[rank], signal.SIGKILL)
            wait_for(log, "resume     from", process, times=2 if rank == 0 else 1)
        assert process.wait() == 0, log.read_text()
    assert digests(run) == digests(whole)
    assert logged(run) == logged(whole)
    assert charted(run) == list(range(1, STEPS + 1))


def test_restarts_need_a_folder_to_come_back_to(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = options(tiny_encoder, small_data, tmp_path / "run")
    del words[words.index("--output-dir") : words.index("--output-dir") + 2]
    with started([*launcher(2, "--max-restarts=1"), *words], log) as process:
        assert process.wait() == 1
    assert "error: torchrun --max-restarts needs --output-dir" in log.read_text()
