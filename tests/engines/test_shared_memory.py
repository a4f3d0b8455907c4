"""Memory of several processes. What training makes of it is tested in test_train.py; here, what each process sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import launcher, started

from sst2_xlmr.engines.cpu.adamw import part_of
from sst2_xlmr.engines.cpu.shared_memory import ALIGNMENT, aligned_bytes, shared_bytes
from sst2_xlmr.util.distributed import World

PROGRAM = """
import os, sys
import torch
from sst2_xlmr.util import distributed
from sst2_xlmr.util.errors import end_among_others
from sst2_xlmr.engines.cpu.shared_memory import Arena, Barrier, aligned_bytes, shared_bytes
if sys.argv[1] == "none":
    del os.memfd_create
elif sys.argv[1] == "another" and os.environ["RANK"] == "1":
    broadcast, file = distributed.broadcast, os.memfd_create("another")
    os.ftruncate(file, 1 << 16)
    from sst2_xlmr.engines.cpu import shared_memory
    def another(world, facts):
        facts = broadcast(world, facts)
        return f"/proc/{os.getpid()}/fd/{file}", facts[1]
    shared_memory.broadcast = another
with distributed.start("cpu", 1, 1) as world:
    like = [torch.zeros(3, 5), torch.zeros(7, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int16)]
    size = aligned_bytes(like)
    memory = shared_bytes(world, world.world_size * size)
    if memory is None:
        print("none")
        end_among_others(0)
    barrier = Barrier(world)
    mine = Arena(memory).take_for_ranks(world, like)
    assert all(not tensor.any() for tensor in mine)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mine)
    for tensor in mine:
        tensor.fill_(world.rank + 1)
    assert barrier.sum(world.rank + 0.5) == 2.0
    everything = Arena(memory)
    for rank in range(2):
        for tensor in like:
            found = everything.take(tensor)
            assert found.shape == tensor.shape and found.dtype == tensor.dtype and (found == rank + 1).all()
    barrier.sum(0)
    print("seen")
end_among_others(0)
"""


@pytest.mark.parametrize(("how", "said"), [("all", "seen"), ("none", "none"), ("another", "none")])
def test_processes_see_what_the_others_write(tmp_path: Path, how: str, said: str) -> None:
    """Or agree that they cannot: no such memory on this system, or another process's file by that name."""
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
    assert aligned_bytes([torch.zeros(1), torch.zeros(16), torch.zeros(17)]) == (1 + 1 + 2) * ALIGNMENT
    assert aligned_bytes([torch.zeros(33, dtype=torch.bfloat16, device="meta")]) == 2 * ALIGNMENT


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


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        for number, shape in enumerate(shapes):
            self.register_parameter(f"p{number}", nn.Parameter(torch.randn(shape), requires_grad=number != 3))


class LateKernels:
    # The kernels, on rank 1 always later than the others.
    def __init__(self, kernels):
        self.kernels = kernels

    def __getattr__(self, name):
        return getattr(self.kernels, name)

    def adamw(self, *arguments):
        time.sleep(0.01 * (world.rank == 1))
        self.kernels.adamw(*arguments)


def backward(optimizer, gradients):
    for state, gradient in zip(optimizer._trained, gradients):
        (state.weight * gradient).sum().backward()


with distributed.start("cpu", 1, 1) as world:
    kernels = load_kernels(dtype)
    together = CpuAdamW(Weights(), 1, Config(weight_decay=0.01), world, LateKernels(kernels))
    alone = CpuAdamW(Weights(), 1, Config(weight_decay=0.01), distributed.World.alone(world.device), kernels)
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
