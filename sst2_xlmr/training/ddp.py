"""Gradients averaged over processes by DistributedDataParallel."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sst2_xlmr.util.distributed import World


def wrap_ddp(model: nn.Module, world: World) -> nn.Module:
    """Return the model under DistributedDataParallel; the model itself with one process.

    DDP rebuilds its buckets after the first backward pass. With three or more processes the order of summation depends
    on them, so that the first step after a resume would differ in the last bit from the same step of a run that was not
    interrupted: there is one backward pass in advance.
    """
    if world.world_size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else []
    wrapped = DistributedDataParallel(model, devices or None, gradient_as_bucket_view=True)
    with torch.random.fork_rng(devices):
        wrapped(torch.zeros(2, dtype=torch.int64, device=world.device), torch.tensor([2])).float().sum().backward()
    wrapped.zero_grad(set_to_none=True)
    return wrapped
