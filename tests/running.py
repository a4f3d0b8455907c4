"""Start the real command line, wait until it is somewhere, do something to it, and compare what comes out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, metrics

from sst2_xlmr import train
from sst2_xlmr.training.checkpoint import find_checkpoint, read_state
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util import distributed
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import end_among_others
from sst2_xlmr.util.files import digest_of

DEADLINE_S = 120
SPEEDS = ("samples_per_s", "tokens_per_s", "memory_gb")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher(processes: int, *options: str) -> list[str]:
    """Return the command in front of train.py: plain Python, or torchrun with static rendezvous."""
    if processes == 1:
        return [sys.executable]
    static = ["--nnodes=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    static += ["--monitor_interval=0.1"]  # torchrun looks every 5 s whether its processes have ended
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *static, *options]


@contextmanager
def started(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own, with its output in `log`; nothing of it is left afterwards."""
    with log.open("ab") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
    try:
        yield process
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a launcher and all its processes, torchrun's workers too, which have sessions of their own."""
    for pid in [process.pid, *descendants(process.pid)]:
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Return the process numbers of all children, and of theirs."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            numbers = [int(number) for number in children.read_text().split()]
        except OSError:
            continue
        for number in numbers:
            found += [number, *descendants(number)]
    return found


def workers(process: subprocess.Popen[bytes]) -> list[int]:
    """Return torchrun's processes of train.py, in the order of their ranks."""
    found = []
    for pid in descendants(process.pid):
        try:
            settings = dict(
                word.split("=", 1)
                for word in Path(f"/proc/{pid}/environ").read_text().split("\0")
                if word.startswith("RANK=")
            )
        except OSError:
            continue
        if settings:
            found.append((int(settings["RANK"]), pid))
    return [pid for _, pid in sorted(found)]


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes], times: int = 1) -> None:
    """Wait until the log has `text`; fails if the process ends before that."""
    deadline = time.monotonic() + DEADLINE_S
    while log.read_text(errors="replace").count(text) < times:
        assert process.poll() is None, f"ended with {process.returncode}: {log.read_text(errors='replace')}"
        assert time.monotonic() < deadline, f"no {text!r} in {log.read_text(errors='replace')}"
        time.sleep(0.005)


def last_step(run: Path) -> int:
    """Return the last step in `metrics.jsonl`, 0 without one."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().rstrip(b"\n").rsplit(b"\n", 2)
        return int(lines[-1].split(b'"step": ')[1].split(b",")[0])
    except (OSError, IndexError, ValueError):
        return 0


def digests(run: Path) -> dict[str, str]:
    """Return what must be equal to the bit: weights of model/ and best/, and the last checkpoint's tensors."""
    last = max((run / "checkpoints").glob("step-*"))
    files = [*(last / f"{name}.safetensors" for name in ("model", "optimizer", "random", "vocabulary"))]
    files += [run / folder / "model.safetensors" for folder in ("best", "model")]
    return {str(file.relative_to(run)): digest_of(file) for file in files}


def state_of(run: Path) -> TrainState:
    """Return the state in a run's last checkpoint; none may be damaged."""
    checkpoint = find_checkpoint(run / "checkpoints", pytest.fail)
    assert checkpoint is not None
    return read_state(checkpoint)


def resume(run: Path, *options: object) -> None:
    """Resume a run in this process."""
    train.main(["--resume", "--output-dir", str(run), *map(str, options)])


def signal_comes(monkeypatch: pytest.MonkeyPatch, step: int, method: str) -> None:
    """Let a signal come while a run's `step` or `evaluate_split` is at work, at this step."""
    real, before = getattr(train.Run, method), step - (method == "step")

    def call(run: Any, *arguments: Any, **options: Any) -> Any:
        if run.state.step == before:
            run.stop.number = 15
        return real(run, *arguments, **options)

    monkeypatch.setattr(train.Run, method, call)


def logged(run: Path) -> list[dict[str, Any]]:
    """Return `metrics.jsonl` without what depends on the clock."""
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in metrics(run)]


def charted(run: Path) -> list[int]:
    """Return the steps of the loss curve as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def on_ranks(processes: int, work: Callable[[World], object], nodes: bool = False) -> None:
    """Call `work` in so many forks of this process, which are one world; with `nodes`, each as if on one of its own."""
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def start(rank: str) -> None:
        local = {"LOCAL_RANK": "0" if nodes else rank, "LOCAL_WORLD_SIZE": "1" if nodes else str(processes)}
        os.environ.update(common, RANK=rank, **local)
        with distributed.start("cpu", 1, 1) as world:
            work(world)
        end_among_others(0)

    forks = [multiprocessing.get_context("fork").Process(target=start, args=(str(n),)) for n in range(processes)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(DEADLINE_S)
        fork.kill()
    assert [fork.exitcode for fork in forks] == [0] * processes
