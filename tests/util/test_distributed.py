"""What several processes do with a broken environment, or when the memory of one of them is full."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, train_options
from running import launcher

from sst2_xlmr.util.distributed import World, wait_for_step

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


# Memory is full on one rank, in a function of train.py's.
FULL = """
import os, sys
import torch, train
function, kind = sys.argv.pop(1), sys.argv.pop(1)
def full(*_, **__):
    if kind == "cuda":
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:83] DefaultCPUAllocator: can't allocate memory: you tried ...")
if os.environ.get("RANK", "0") == os.environ["FULL_RANK"]:
    setattr(train, function, full)
train.exit_on_user_error(train.main)
"""


@pytest.mark.parametrize(
    ("processes", "function", "kind", "options", "says"),
    [
        (1, "forward_backward", "cuda", [], "the GPU's memory is full: start again with --micro-batch-size 4 or less"),
        (
            1,
            "forward_backward",
            "cpu",
            ["--micro-batch-size", 3],
            "the memory is full: start again with --micro-batch-size 1",
        ),
        (1, "evaluate", "cuda", [], "the GPU's memory is full: start again with --eval-batch-tokens 2048 or less"),
        (
            2,
            "forward_backward",
            "cuda",
            [],
            "the GPU's memory is full on rank 1: start again with --micro-batch-size 2",
        ),
        (2, "evaluate", "cpu", [], "the memory is full on rank 1: start again with --eval-batch-tokens 2048 or less"),
    ],
)
def test_the_rank_whose_memory_is_full_says_so_and_what_to_set(
    tiny_encoder: Path,
    small_data: Path,
    tmp_path: Path,
    processes: int,
    function: str,
    kind: str,
    options: list[object],
    says: str,
) -> None:
    program = tmp_path / "full.py"
    program.write_text(FULL)
    words = train_options(tiny_encoder, small_data, tmp_path / "run", "--epochs", 1, *options)
    command = [*launcher(processes), str(program), function, kind, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FULL_RANK": str(processes - 1)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len([line for line in errors if says in line]) == 1, done.stderr
    assert done.returncode == (2 if processes == 1 else 1)
    assert all("lost contact" in line for line in errors if says not in line)
    # A traceback of torchrun's own is no business of ours.
    assert "train.py" not in done.stderr, "a traceback of ours"
