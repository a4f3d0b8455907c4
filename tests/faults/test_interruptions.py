"""Kills, signals, lost peers: each is said, and what comes out is the run that nobody disturbed, bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import running
from conftest import ALONE, SAMPLE_DATA, Patch, Words, train_options, user_error, write_small_data
from running import digests, forked, forked_ranks, launcher, logged, resume, started, train_on_ranks, wait_for

from sst2_xlmr import train
from sst2_xlmr.training.signals import StopRequest
from sst2_xlmr.util import distributed
from sst2_xlmr.util.errors import SIGNALS
from sst2_xlmr.util.files import SCRATCH_MARK

STEPS = 60


def run_with_kills(words: list[str], run: Path, kills: int, processes: int) -> int:
    """Run to the end, and kill all processes at `kills` random moments; returns how many kills hit a running one."""
    chance = random.Random(1)
    hits = 0
    for target in sorted(chance.randrange(STEPS) for _ in range(kills)):
        resume = ["--resume"] if (run / "config.json").is_file() else []
        with forked_ranks(processes, ["train.py", *words, *resume], run.with_suffix(".log")) as forks:
            while forks[0].poll() is None and running.last_step(run) < target:
                time.sleep(0.002)
            time.sleep(chance.random() * 0.05)
            hits += forks[0].poll() is None
            for fork in forks:
                running.kill_group(fork)
    train_on_ranks(processes, [*words, "--resume"], run.parent)
    return hits


MANY = [pytest.param(kind, ranks, 20, marks=pytest.mark.slow) for kind in ("fp32", "bf16") for ranks in (1, 2)]


@pytest.mark.parametrize(("precision", "processes", "kills"), [("fp32", 1, 2), ("bf16", 2, 2), *MANY])
def test_killed_run_is_the_same(train_words: Words, tmp_path: Path, precision: str, processes: int, kills: int) -> None:
    """With dropout, accumulation, evaluations and checkpoints that fall on different steps, and an epoch of 7 steps."""
    options = ["--max-steps", STEPS, "--precision", precision, "--micro-batch-size", 3, "--lr", 3e-4]
    options += ["--eval-every", 9, "--save-every", 5, "--test-file", SAMPLE_DATA / "test.de.tsv"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_on_ranks(processes, train_words(whole, *options), tmp_path)
    assert run_with_kills(train_words(broken, *options), broken, kills, processes) >= kills * 0.8
    assert digests(broken) == digests(whole)
    assert logged(broken) == logged(whole)
    assert running.charted(broken) == running.charted(whole) == list(range(1, STEPS + 1))
    assert not list(broken.rglob(f"*{SCRATCH_MARK}"))


OPTIONS = ["--max-steps", STEPS, "--eval-every", 25]


@pytest.fixture(scope="module")
def whole(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    train.main(train_options(tiny_encoder, write_small_data(folder / "data"), folder / "whole", *OPTIONS))
    return folder / "whole"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_saves_exactly(number: signal.Signals, train_words: Words, whole: Path, tmp_path: Path) -> None:
    """As systemd, timeout and scancel send it, to the whole group."""
    run, log = tmp_path / "run", tmp_path / "log"
    with forked(["train.py", *train_words(run, *OPTIONS)], log) as process:
        wait_for(log, "step ", process, times=20)
        for _ in range(2):  # a second one is harmless
            os.killpg(process.pid or 0, number)
        assert process.wait() == 128 + number, log.read_text()
    said = log.read_text()
    assert f"stopped    by {number.name} after step " in said
    assert f"train.py --resume --output-dir {run}" in said
    assert "Traceback" not in said
    assert not (run / "model").exists()
    resume(run)
    assert (digests(run), logged(run)) == (digests(whole), logged(whole))
    assert running.charted(run) == list(range(1, STEPS + 1))


def test_a_second_signal_does_not_kill_a_process_that_ends() -> None:
    previous = signal.getsignal(signal.SIGUSR1)
    with StopRequest(ALONE):
        pass
    assert signal.getsignal(signal.SIGUSR1) == previous
    try:
        with StopRequest(ALONE) as stop:
            signal.raise_signal(signal.SIGUSR1)
        assert stop.signal == signal.SIGUSR1
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
    train_on_ranks(2, [*words[1:], "--resume"], tmp_path)
    assert [line["step"] for line in logged(run) if "split" not in line] == list(range(1, STEPS + 1))
    assert "lost contact" not in log.read_text()


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_others_end_when_one_dies_or_hangs(train_words: Words, tmp_path: Path, rank: int, number: int) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["train.py", *train_words(run, "--save-every", 10, "--timeout-minutes", 0.1, "--max-steps", 5000)]
    with forked_ranks(2, words, log) as forks:
        wait_for(log, "step ", forks[0], times=30)
        forks[rank].send_signal(number)
        assert forks[1 - rank].wait() == 1
    said = log.read_text()
    assert f"error: rank {1 - rank}: lost contact with another process (" in said
    assert "did not respond for 0.1 minutes" in said and "use --resume" in said
    assert "Traceback" not in said
    assert running.state_of(run).step >= 10


def test_rank_0_waits_for_one_that_hangs_no_longer_than_the_timeout(tmp_path: Path, monkeypatch: Patch) -> None:
    def late(_: list[str]) -> None:
        with distributed.init_distributed("cpu", 1, 0.05) as world:
            distributed.on_rank0(world, lambda: time.sleep(4))  # a slow disk: the other waits longer than the timeout
            time.sleep(60 * world.rank)
            distributed.on_rank0(world, lambda: None)

    monkeypatch.setattr(train, "main", late)
    with forked_ranks(2, ["train.py"], tmp_path / "log") as forks:
        wait_for(tmp_path / "log", "error: rank 0: lost contact with another process (Operation timed out", forks[1])


def test_torchrun_restarts_and_the_result_is_exact(train_words: Words, tmp_path: Path) -> None:
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    options = ["--max-steps", 100, "--save-every", 10]
    train_on_ranks(2, train_words(whole, *options), tmp_path)
    words = [*launcher(2, "--max-restarts=3"), "train.py", *train_words(run, *options)]
    with started(words, log) as process:
        for times, rank in ((30, 1), (60, 0)):
            wait_for(log, "step ", process, times=times)
            os.kill(running.workers(process)[rank], signal.SIGKILL)
            wait_for(log, "resume     from", process, times=2 if rank == 0 else 1)
        assert process.wait(running.DEADLINE_S) == 0, log.read_text()
    assert digests(run) == digests(whole)
    assert logged(run) == logged(whole)
    assert running.charted(run) == list(range(1, 101))


def test_restarts_need_a_folder_to_come_back_to(monkeypatch: Patch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert "torchrun --max-restarts needs --output-dir" in user_error(train.main, ["--device", "cpu"])
