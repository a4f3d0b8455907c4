"""What several processes do with a broken environment, or when the memory of one of them is full."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, train_options
from running import free_port

from sst2_xlmr.util.distributed import World, _agree_on_device, wait_for_step
from sst2_xlmr.util.errors import UserError

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "x"}, "RANK=x, which is not a number from 0"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1, which is not a number from 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two, which is not a number"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3, but WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, "RANK=0, but WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but no RANK"),
        ({**TORCHRUN, "MASTER_ADDR": "", "MASTER_PORT": "29500"}, "WORLD_SIZE=2, but no MASTER_ADDR"),
        (TORCHRUN, "WORLD_SIZE=2, but no MASTER_PORT"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT=99999, which is not a port"),
    ],
)
def test_a_broken_environment_is_one_line(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, variables: dict[str, str], says: str
) -> None:
    command = [sys.executable, "train.py", *train_options(tiny_encoder, small_data, tmp_path / "run")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: the environment has ") and says in done.stderr
    assert not (tmp_path / "run").exists()


class Event:
    """A CUDA event that is reached after some looks at it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_step_of_the_gpu_that_does_not_end_counts_as_a_lost_peer() -> None:
    world = dataclasses.replace(World.alone(torch.device("cuda", 0)), timeout_s=0.05)
    event: Any = Event(3)
    wait_for_step(event, world)
    with pytest.raises(dist.DistError, match="the GPU still waits for it"):
        wait_for_step(Event(10**9), world)  # type: ignore[arg-type]


# A fault on one rank, in a function of `run` or `train` that is named on the command line.
FAULTY = """
import os, sys, time
import torch
from sst2_xlmr import run, train
from sst2_xlmr.__main__ import main
module, function, kind, rank = [sys.argv.pop(1) for _ in range(4)]
module = {"run": run, "train": train}[module]
real = getattr(module, function)
def faulty(*arguments, **named):
    if kind == "cuda":
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if kind == "cpu":
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:83] DefaultCPUAllocator: can't allocate memory: you")
    time.sleep(float(kind))
    return real(*arguments, **named)
if os.environ.get("RANK", "0") == rank:
    setattr(module, function, faulty)
main("train")
"""


def run_program(program: Path, text: str, processes: int, *words: object) -> tuple[list[int], list[str]]:
    """Run a program around training, on one node; returns every rank's status, and all lines of errors."""
    program.write_text(text)
    command, port = [sys.executable, str(program), *map(str, words)], str(free_port())
    started = []
    for rank in map(str, range(processes)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        place = {} if processes == 1 else {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **place}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    said = "".join(process.communicate(timeout=120)[1] for process in started)
    assert "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    return [process.returncode for process in started], errors


@pytest.mark.parametrize(
    ("processes", "place", "kind", "options", "says"),
    [
        (1, "train forward_backward", "cuda", [], "--micro-batch-size 4 or less"),
        (1, "train forward_backward", "cpu", ["--micro-batch-size", 3], "--micro-batch-size 1"),
        (1, "run evaluate", "cuda", [], "--eval-batch-tokens 2048 or less"),
        (2, "train forward_backward", "cuda", [], "--micro-batch-size 2"),
        (2, "run evaluate", "cpu", [], "--eval-batch-tokens 2048 or less"),
    ],
)
def test_the_rank_whose_memory_is_full_says_so_and_what_to_set(
    tiny_encoder: Path,
    small_data: Path,
    tmp_path: Path,
    processes: int,
    place: str,
    kind: str,
    options: list[object],
    says: str,
) -> None:
    words = train_options(tiny_encoder, small_data, tmp_path / "run", "--epochs", 1, *options)
    fault = [*place.split(), kind, processes - 1]
    statuses, errors = run_program(tmp_path / "full.py", FAULTY, processes, *fault, *words)
    (error,) = [line for line in errors if "lost contact" not in line]
    assert f"out of memory{'' if processes == 1 else ' (rank 1)'}: rerun with {says}" in error
    assert statuses == ([2] if processes == 1 else [1, 2])


def test_a_slow_disk_of_rank_0_is_no_lost_process(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    """Longer than --timeout-minutes, while the others wait for what only rank 0 writes."""
    options = ["--max-steps", 2, "--timeout-minutes", 0.05]
    words = train_options(tiny_encoder, small_data, tmp_path / "run", *options)
    assert run_program(tmp_path / "slow.py", FAULTY, 2, "run", "export_run", 6, 0, *words) == ([0, 0], [])
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_an_error_of_rank_0s_report_reaches_all_ranks(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    """A disk that is full for metrics: one line, and nobody has lost contact."""
    program = "from sst2_xlmr.report.console import Report\nreal = Report.log_training\n"
    program += "def full(report, entry):\n    report._metrics = open('/dev/full', 'a')\n    real(report, entry)\n"
    program += "Report.log_training = full\nfrom sst2_xlmr.__main__ import main\nmain('train')\n"
    words = train_options(tiny_encoder, small_data, tmp_path / "run", "--epochs", 1)
    for processes in (1, 2):
        statuses, (error,) = run_program(tmp_path / "full.py", program, processes, *words)
        assert "cannot write metrics to " in error and "No space left on device" in error
        assert statuses == [2] * processes
        shutil.rmtree(tmp_path / "run")


# Every rank as if on a node of its own, in a folder of its own.
NODES = """
import os, sys
os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
os.chdir(os.path.join(sys.argv.pop(1), os.environ["RANK"]))
option = sys.argv.pop(1)
if os.environ["RANK"] == "1" and option:
    sys.argv += option.split()
from sst2_xlmr.__main__ import main
main("train")
"""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--lr 2e-3", "rank 1 has --lr 0.002, rank 0 0.001; start all with the same options"),
        ("--seed 5", "rank 1 has --seed 5, rank 0 0; start all with the same options"),
        ("data/dev.tsv", "rank 1 has file dev "),
        ("data/train.tsv", "rank 1 has training rows "),
        ("encoder/model.safetensors", "rank 1 has encoder's weights "),
        ("encoder/sentencepiece.bpe.model", "rank 1 has tokenizer "),
    ],
)
def test_ranks_with_other_options_or_files_are_refused(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, change: str, says: str
) -> None:
    for node in ("0", "1"):
        shutil.copytree(tiny_encoder, tmp_path / node / "encoder")
        shutil.copytree(small_data, tmp_path / node / "data")
    if file := "" if change.startswith("--") else change:
        content = (tmp_path / "1" / file).read_bytes()
        if "piece" in file:
            changed = content.replace("\u2581film".encode(), "\u2581mlif".encode())
        else:
            changed = content[:-1] + b"\1" if "model" in file else content + b"one row more\t1\n"
        assert changed != content
        (tmp_path / "1" / file).write_bytes(changed)
    words = train_options(Path("/proc/self/cwd/encoder"), Path("/proc/self/cwd/data"), tmp_path / "run")
    option = "" if file else change
    statuses, errors = run_program(tmp_path / "nodes.py", NODES, 2, tmp_path, option, *words)
    assert len(errors) == 1 and says in errors[0], errors
    assert statuses == [2, 2]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("asked", ["auto", "cpu", "cuda"])
@pytest.mark.parametrize(("first", "mine"), [(True, True), (True, False), (False, True), (False, False)])
def test_rank_0_decides_what_auto_means(monkeypatch: pytest.MonkeyPatch, asked: str, first: bool, mine: bool) -> None:
    """For all: a node without a GPU says so, and one with a GPU computes on its CPU if rank 0 does."""
    store = dist.HashStore()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: first)
    agreed = _agree_on_device("auto", 0, store)
    assert agreed == ("cuda" if first else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: mine)
    if asked == agreed or (asked == "auto" and (mine or not first)):
        assert _agree_on_device(asked, 1, store) == agreed
    else:
        with pytest.raises(UserError, match=f"rank 1 would compute on .*, but rank 0 on {agreed}; give all") as error:
            _agree_on_device(asked, 1, store)
        assert error.value.is_own
