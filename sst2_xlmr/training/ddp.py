"""Gradients averaged over processes by DistributedDataParallel."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sst2_xlmr.util.distributed import World


def wrap_ddp(model: nn.Module, world: World) -> nn.Module:
    """Return the model under DistributedDataParallel; the model itself with one process."""
    if world.world_size == 1:
        return model
    device_ids = [world.device] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
    settle_buckets(wrapped, world.device)
    return wrapped


def settle_buckets(model: DistributedDataParallel, device: torch.device) -> None:
    """Run one backward pass in advance, because DDP rebuilds its buckets after the first one.

    With three or more processes the order of summation depends on the buckets, so that the first step after a resume
    would differ in the last bit from the same step of a run that was not interrupted.
    """
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    model(ids, torch.tensor([2])).float().sum().backward()
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(cpu_state)
    if cuda_state is not None:
        torch.cuda.set_rng_state(cuda_state, device)
