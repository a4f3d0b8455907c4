"""Memory of several processes. What training makes of it is tested in test_train.py; here, what each process sees."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Patch, kernels_for
from running import on_ranks
from torch import nn

from sst2_xlmr.config import Config
from sst2_xlmr.engines.cpu import shared_memory
from sst2_xlmr.engines.cpu.adamw import CpuAdamW
from sst2_xlmr.engines.cpu.kernels import Kernels
from sst2_xlmr.engines.cpu.shared_memory import shared_bytes
from sst2_xlmr.util.distributed import World, broadcast


def optimizer(world: World, kernels: Kernels) -> CpuAdamW:
    torch.manual_seed(1)
    shapes = [(1,), (3,), (63,), (64,), (65,), (129,), (7, 9), (33, 100), (1000, 17)]
    weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
    weights[3].requires_grad_(False)
    return CpuAdamW(weights, 1, Config(weight_decay=0.01), world, kernels)


def backward(optimizer: CpuAdamW, gradients: list[torch.Tensor]) -> None:
    for state, gradient in zip(optimizer._trained, gradients):
        (state.weight * gradient).sum().backward()


def check_steps(world: World, dtype: torch.dtype) -> None:
    kernels = kernels_for(dtype)
    adamw = kernels.adamw

    def late_on_rank_1(*arguments: Any) -> None:
        time.sleep(0.01 * (world.rank == 1))
        adamw(*arguments)

    kernels.adamw = late_on_rank_1  # type: ignore[method-assign, assignment]
    together, alone = (optimizer(each, kernels) for each in (world, World.alone(world.device)))
    assert together.shares_memory
    for step in range(1, 12):
        accumulated, is_bad = dtype == torch.bfloat16 and step % 3 == 0, step % 5 == 0
        torch.manual_seed(step)
        gradients = [[torch.randn(state.weight.shape).to(dtype) for state in alone._trained] for _ in range(3)]
        if is_bad:
            gradients[step % 3][2][-1] = float("nan")
        time.sleep(0.02 * (step % 7 == world.rank))
        if accumulated:
            with together.no_sync():  # a first micro-batch, whose gradient is zero
                backward(together, [torch.zeros_like(gradient) for gradient in gradients[world.rank]])
        backward(together, gradients[world.rank])
        alone._accumulates = True
        for state, *of_ranks in zip(alone._trained, *gradients):
            first, second, third = (gradient.float() for gradient in of_ranks)
            state.accumulator = (first + second + third) / 3
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_together_are_those_of_one_process(dtype: torch.dtype) -> None:
    """To the bit, with ranks that come late, micro-batches, frozen and tiny parameters, and NaN on one rank only."""
    kernels_for(dtype)
    on_ranks(3, partial(check_steps, dtype=dtype))


def test_processes_agree_that_they_share_no_memory(monkeypatch: Patch) -> None:
    """There may be another process's file by that name, no such memory on this system, or another node."""

    def check(world: World) -> None:
        with monkeypatch.context() as patched:
            if world.rank == 1:
                file = os.memfd_create("another")
                os.ftruncate(file, 1 << 16)
                another = f"/proc/{os.getpid()}/fd/{file}"
                patched.setattr(shared_memory, "broadcast", lambda *facts: (another, broadcast(*facts)[1]))
            assert shared_bytes(world, 64) is None
        monkeypatch.delattr(os, "memfd_create")
        assert shared_bytes(world, 64) is None

    on_ranks(2, check)
    assert shared_bytes(World(0, 2, 0, 1, torch.device("cpu")), 64) is None
