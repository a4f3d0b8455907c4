"""Start a program, wait until it is somewhere, do something to it, and compare what comes out.

`started` does as a shell does; the others fork this process: no seconds to import torch, and monkeypatches stay.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Patch, free_port, metrics

from sst2_xlmr import train
from sst2_xlmr.__main__ import main
from sst2_xlmr.programs import study_runs
from sst2_xlmr.training.checkpoint import find_checkpoint, read_state
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util import distributed
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import end_among_others
from sst2_xlmr.util.files import digest_of

DEADLINE_S = 120


def launcher(processes: int, *options: str) -> list[str]:
    """Return the command in front of train.py: torchrun with static rendezvous."""
    static = ["--nnodes=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    static += ["--monitor_interval=0.1"]  # torchrun looks every 5 s whether its processes have ended
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *static, *options]


def torchrun(processes: int, options: list[str], nodes: bool = False) -> str:
    """Run `train.py` under torchrun; with `nodes`, each process as if on a node of its own. Returns what it printed."""
    program = [str(ROOT / "train.py"), *options]
    if nodes:
        program = ["--no-python", "env", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1", sys.executable, *program]
    return printed_by(ROOT, *launcher(processes), *program)


def printed_by(root: Path, *command: object) -> str:
    """Run a command from `root`, with the package that is there, which must end well."""
    words, env = list(map(str, command)), {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def started(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own, with its output in `log`; nothing of it is left afterwards."""
    with log.open("ab") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
    try:
        yield process
    finally:
        kill_group(process)


class Fork(ForkProcess):
    """As subprocess.Popen for one of our programs (path and options), in a process group of its own."""

    def __init__(self, words: list[str], log: Path, errors: Path | None = None, **environment: str) -> None:
        super().__init__()
        self.words, self.files, self.environment = words, (log, errors or log), environment
        for file in self.files:
            file.touch()
        self.start()

    def run(self) -> None:
        os.setsid()
        for descriptor, file in zip((1, 2), self.files):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ.update(self.environment)
        os.chdir(ROOT)
        sys.argv = self.words
        main(Path(self.words[0]).stem)

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float = DEADLINE_S) -> int:
        self.join(timeout)
        assert self.exitcode is not None, f"still running after {timeout} s: {self.words}"
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid or 0, number)


Process = subprocess.Popen[bytes] | Fork


@contextmanager
def forked(words: list[str], log: Path, errors: Path | None = None) -> Iterator[Fork]:
    """As `started` for one of our programs (its path and options), in a fork."""
    with forked_ranks(1, words, log, errors) as (process,):
        yield process


def call_in_forks(program: Callable[[list[str]], object], *options: object) -> None:
    """Call a program that starts training as a process of its own: it starts it in a fork."""
    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        start = len(study_runs.TRAIN_COMMAND)
        if command[:start] != study_runs.TRAIN_COMMAND:
            return real(command, **options)
        return Fork(["train.py", *command[start:]], Path(options["stdout"].name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", popen)
        program([str(option) for option in options])


def environments(processes: int, nodes: bool) -> list[dict[str, str]]:
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common["LOCAL_WORLD_SIZE"] = "1" if nodes else str(processes)
    return [{**common, "RANK": str(n), "LOCAL_RANK": "0" if nodes else str(n)} for n in range(processes)]


@contextmanager
def forked_ranks(
    processes: int, words: list[str], log: Path, errors: Path | None = None, nodes: bool = False
) -> Iterator[list[Fork]]:
    """As `forked`; several processes have torchrun's variables, with `nodes` each as if on a node of its own."""
    ranks = environments(processes, nodes) if processes > 1 else [{}]
    forks = [Fork(words, log, errors, **environment) for environment in ranks]
    try:
        yield forks
    finally:
        for fork in forks:
            kill_group(fork)


def run_ranks(
    processes: int, options: list[str], folder: Path, nodes: bool = False, program: str = "train.py"
) -> tuple[list[int], str, str]:
    """Run a program to its end in `folder`; returns every rank's status, and all their standard output and error."""
    log, errors = (folder / f"ranks-{time.monotonic_ns()}.{end}" for end in ("out", "err"))
    with forked_ranks(processes, [program, *options], log, errors, nodes) as forks:
        return [fork.wait() for fork in forks], log.read_text(), errors.read_text()


def train_on_ranks(processes: int, options: list[str], folder: Path, nodes: bool = False) -> str:
    """As `run_ranks` for a run that must end well; returns what was printed."""
    statuses, said, errors = run_ranks(processes, options, folder, nodes)
    assert set(statuses) == {0}, errors
    return said


def kill_group(process: Process) -> None:
    """SIGKILL for a launcher and all its processes, torchrun's workers too, which have sessions of their own."""
    assert process.pid
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
    found = {}
    for pid in descendants(process.pid):
        with suppress(OSError):
            if rank := re.search(rb"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes()):
                found[int(rank[1])] = pid
    return [found[rank] for rank in sorted(found)]


def wait_for(log: Path, text: str, process: Process, times: int = 1) -> None:
    """Wait until the log has `text`; fails if the process ends before that."""
    deadline, said = time.monotonic() + DEADLINE_S, ""
    while said.count(text) < times:
        assert process.poll() is None, f"ended with {process.poll()}: {said}"
        assert time.monotonic() < deadline, f"no {text!r} in {said}"
        time.sleep(0.005)
        said = log.read_text(errors="replace") if log.is_file() else ""


def last_step(run: Path) -> int:
    """Return the last step in `metrics.jsonl`, 0 without one."""
    file = run / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+),', file.read_text()) if file.is_file() else []
    return int(steps[-1]) if steps else 0


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
    train.main(["--resume", "--output-dir", str(run), *map(str, options)])


def at_step(monkeypatch: Patch, step: int, act: Callable[[Any], object], method: str = "advance") -> None:
    """Let something happen to a run while its `advance` or `evaluate_split` is at work, at this step."""
    real, before = getattr(train.Run, method), step - (method == "advance")

    def call(run: Any, *arguments: Any, **options: Any) -> Any:
        if run.state.step == before:
            act(run)
        return real(run, *arguments, **options)

    monkeypatch.setattr(train.Run, method, call)


def stop_by_signal(step: int, method: str, start: Callable[[], object]) -> None:
    """Start a run, and let SIGTERM come while its `advance` or `evaluate_split` is at work, at this step."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda run: setattr(run.stop_request, "signal", signal.SIGTERM), method)
        with pytest.raises(SystemExit, match=f"^{128 + signal.SIGTERM}$"):
            start()


def forget_after(run: Path, step: int) -> None:
    """Leave of a run what it had when it was stopped after this step."""
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:08}":
            shutil.rmtree(checkpoint)
    shutil.rmtree(run / "model")
    assert state_of(run).step == step


def logged(run: Path) -> list[dict[str, Any]]:
    """Return `metrics.jsonl` without what depends on the clock."""
    speeds = ("samples_per_s", "tokens_per_s", "memory_gb")
    return [{key: value for key, value in line.items() if key not in speeds} for line in metrics(run)]


def events_in(folder: Path) -> Any:
    """Return all that TensorBoard reads from a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def charted(run: Path) -> list[int]:
    """Return the steps of the loss curve as TensorBoard shows it."""
    return [event.step for event in events_in(run / "tensorboard").Scalars("train/loss")]


def on_ranks(processes: int, work: Callable[[World], object], nodes: bool = False) -> None:
    """Call `work` in so many forks of this process, which are one world; with `nodes`, each as if on one of its own."""

    def start(environment: dict[str, str]) -> None:
        os.environ.update(environment)
        with distributed.init_distributed("cpu", 1, 1) as world:
            work(world)
        end_among_others(0)

    fork_one = multiprocessing.get_context("fork").Process
    forks = [fork_one(target=start, args=(environment,)) for environment in environments(processes, nodes)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(DEADLINE_S)
        fork.kill()
    assert [fork.exitcode for fork in forks] == [0] * processes
