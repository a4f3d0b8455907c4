"""SIGTERM, SIGINT, SIGUSR1: the step is finished, the run saved, and the rest of it equals the undisturbed run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import Words, train_options, write_small_data
from running import charted, digests, forked, forked_ranks, launcher, logged, resume, run_ranks, started, wait_for

from sst2_xlmr import train
from sst2_xlmr.training.signals import StopRequest
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import SIGNALS

STEPS = 60  # a signal comes in the first of them


OPTIONS = ["--max-steps", STEPS, "--eval-every", 25]


@pytest.fixture(scope="module")
def whole(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("signals")
    train.main(train_options(tiny_encoder, write_small_data(folder / "data"), folder / "whole", *OPTIONS))
    return folder / "whole"


def check_stopped_and_resumed(run: Path, log: Path, whole: Path, number: signal.Signals) -> None:
    """Check what a stopped run says and leaves, and resume it to its end."""
    said = log.read_text()
    assert f"stopped    by {number.name} after step " in said
    assert f"train.py --resume --output-dir {run}" in said
    assert "Traceback" not in said
    assert not (run / "model").exists()
    resume(run, "--num-workers", 0)
    assert digests(run) == digests(whole)
    assert logged(run) == logged(whole)
    assert charted(run) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_signal_saves_and_the_rest_is_exact(
    number: signal.Signals, train_words: Words, whole: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with forked(["train.py", *train_words(run, *OPTIONS)], log) as process:
        wait_for(log, "step ", process, times=20)
        process.send_signal(number)
        process.send_signal(number)  # a second one is harmless
        assert process.wait() == 128 + number
    check_stopped_and_resumed(run, log, whole, number)


def test_sigterm_to_the_whole_group_saves_and_the_rest_is_exact(
    train_words: Words, whole: Path, tmp_path: Path
) -> None:
    """As systemd, timeout and scancel send it: the loader's workers get it too, and before the step is done."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = [*launcher(1), "train.py", *train_words(run, *OPTIONS, "--num-workers", 2)]
    with started(words, log) as process:
        wait_for(log, "step ", process, times=20)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM, log.read_text()
    check_stopped_and_resumed(run, log, whole, signal.SIGTERM)


def test_a_second_signal_does_not_kill_a_process_that_ends() -> None:
    former = signal.getsignal(signal.SIGUSR1)
    with StopRequest(World.alone(torch.device("cpu"))):
        pass
    assert signal.getsignal(signal.SIGUSR1) == former
    try:
        with StopRequest(World.alone(torch.device("cpu"))) as stop:
            signal.raise_signal(signal.SIGUSR1)
        assert stop.number == signal.SIGUSR1
        signal.raise_signal(signal.SIGUSR1)  # would end the tests
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def test_a_signal_to_one_of_several_processes_stops_all_at_one_step(train_words: Words, tmp_path: Path) -> None:
    """It comes to one rank; then to torchrun, which passes it on and ends since its processes did."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["train.py", *train_words(run, *OPTIONS)]
    with forked_ranks(2, words, log) as forks:
        wait_for(log, "step ", forks[0], times=20)
        forks[1].send_signal(signal.SIGUSR1)
        assert [fork.wait() for fork in forks] == [128 + signal.SIGUSR1] * 2
    assert "stopped    by SIGUSR1 after step " in log.read_text()
    with started([*launcher(2), *words, "--resume"], log) as process:
        wait_for(log, "resume     from", process)
        wait_for(log, "step ", process, times=log.read_text().count("step ") + 10)
        process.terminate()
        assert process.wait(timeout=20) != 0
    assert "stopped    by SIGTERM after step " in log.read_text()
    assert run_ranks(2, [*words[1:], "--resume"], tmp_path)[0] == [0, 0]
    assert [line["step"] for line in logged(run) if "split" not in line] == list(range(1, STEPS + 1))
    assert "lost contact" not in log.read_text()
