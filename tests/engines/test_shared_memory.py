"""Memory of several processes. What training makes of it is tested in test_train.py; here, what each process sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import launcher, started

from sst2_xlmr.engines.cpu.adamw import part_of
from sst2_xlmr.engines.cpu.shared_memory import ALIGNMENT, Arena, aligned_bytes, shared_bytes
from sst2_xlmr.util.distributed import World

PROGRAM = """
import os, sys
from sst2_xlmr.engines.cpu import shared_memory
from sst2_xlmr.util import distributed
from sst2_xlmr.util.errors import end_among_others
if sys.argv[1] == "none":
    del os.memfd_create
elif sys.argv[1] == "another" and os.environ["RANK"] == "1":
    broadcast, file = distributed.broadcast, os.memfd_create("another")
    os.ftruncate(file, 1 << 16)
    shared_memory.broadcast = lambda *facts: (f"/proc/{os.getpid()}/fd/{file}", broadcast(*facts)[1])
with distributed.start("cpu", 1, 1) as world:
    print("none" if shared_memory.shared_bytes(world, 64) is None else "shared")
end_among_others(0)
"""


@pytest.mark.parametrize(("how", "said"), [("all", "shared"), ("none", "none"), ("another", "none")])
def test_processes_agree_whether_they_share_memory(tmp_path: Path, how: str, said: str) -> None:
    """There may be no such memory on this system, or another process's file by that name."""
    program, log = tmp_path / "program.py", tmp_path / "log"
    program.write_text(PROGRAM)
    with started([*launcher(2), str(program), how], log) as process:
        assert process.wait(timeout=60) == 0, log.read_text()
    assert log.read_text().count(said) == 2


def test_processes_of_several_nodes_have_none() -> None:
    assert shared_bytes(World(0, 2, 0, 1, torch.device("cpu")), 64) is None


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 4096])
def test_parts_make_the_whole(ranks: int, n: int) -> None:
    parts = [part_of(n, World(rank, ranks, rank, ranks, torch.device("cpu"))) for rank in range(ranks)]
    assert [number for start, stop in parts for number in range(start, stop)] == list(range(n))
    assert all(start % 64 == 0 or start == n for start, _ in parts), "no cache line is written by two"


def test_no_two_tensors_share_a_cache_line() -> None:
    like = [torch.zeros(1), torch.zeros(2, 8), torch.zeros(33, dtype=torch.bfloat16, device="meta")]
    assert aligned_bytes(like) == (1 + 1 + 2) * ALIGNMENT
    memory = shared_bytes(World.alone(torch.device("cpu")), aligned_bytes(like))
    if memory is None:
        pytest.skip("there is no memory to share")
    arena = Arena(memory)
    for tensor in like:
        found = arena.take(tensor)
        assert (found.shape, found.dtype, found.data_ptr() % ALIGNMENT) == (tensor.shape, tensor.dtype, 0)
        assert not found.any()


STEPS_TOGETHER = """
import sys, time
import torch
from torch import nn
from sst2_xlmr.util import distributed
from sst2_xlmr.util.errors import end_among_others
from sst2_xlmr.engines.cpu.kernels import load_kernels
from sst2_xlmr.config import Config
from sst2_xlmr.engines.cpu.adamw import CpuAdamW

dtype = torch.bfloat16 if sys.argv[1] == "bf16" else torch.float32
shapes = [(1,), (3,), (63,), (64,), (65,), (129,), (7, 9), (33, 100), (1000, 17)]


def weights():
    torch.manual_seed(1)
    found = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
    found[3].requires_grad_(False)
    return found


def backward(optimizer, gradients):
    for state, gradient in zip(optimizer._trained, gradients):
        (state.weight * gradient).sum().backward()


with distributed.start("cpu", 1, 1) as world:
    kernels = load_kernels(dtype)
    adamw = kernels.adamw
    kernels.adamw = lambda *arguments: (time.sleep(0.01 * (world.rank == 1)), adamw(*arguments))  # rank 1 is late
    together = CpuAdamW(weights(), 1, Config(weight_decay=0.01), world, kernels)
    alone = CpuAdamW(weights(), 1, Config(weight_decay=0.01), distributed.World.alone(world.device), kernels)
    assert together.shares_memory
    for step in range(1, 41):
        accumulated, is_bad = dtype == torch.bfloat16 and step % 3 == 0, step % 5 == 0
        torch.manual_seed(step)
        gradients = [[torch.randn(state.weight.shape).to(dtype) for state in alone._trained] for _ in range(3)]
        if is_bad:
            gradients[step % world.world_size][2][-1] = float("nan")
        time.sleep(0.02 * (step % 7 == world.rank))
        if accumulated:
            with together.no_sync():  # a first micro-batch, whose gradient is zero
                backward(together, [torch.zeros_like(gradient) for gradient in gradients[world.rank]])
        backward(together, gradients[world.rank])
        alone._accumulates = True
        for number, state in enumerate(alone._trained):
            total = gradients[0][number].float()
            for other in gradients[1 : world.world_size]:
                total = total + other[number].float()
            state.accumulator = total / world.world_size
        norms = together.clip(0.5), alone.clip(0.5)
        assert all(norm.isfinite() == (not is_bad) for norm in norms)
        if is_bad:
            together.clear_gradients()
            alone.clear_gradients()
            continue
        torch.testing.assert_close(*norms)
        alone._norm = together._norm  # else the factor may differ in its last bit
        together.step(1e-2)
        alone.step(1e-2)
        for ours, theirs in zip(together._trained, alone._trained):
            found, expected = ours.tensors(), theirs.tensors()
            assert all(torch.equal(found[name], expected[name]) for name in expected), (step, ours.name)
    print("equal")
end_among_others(0)
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("processes", [2, 3])
def test_steps_together_are_those_of_one_process(tmp_path: Path, precision: str, processes: int) -> None:
    """To the bit, with ranks that come late, micro-batches, frozen and tiny parameters, and NaN on one rank only."""
    program, log = tmp_path / "program.py", tmp_path / "log"
    program.write_text(STEPS_TOGETHER)
    with started([*launcher(processes), str(program), precision], log) as process:
        assert process.wait(timeout=60) == 0, log.read_text()
    assert log.read_text().count("equal") == processes
