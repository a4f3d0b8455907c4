"""How gradients are averaged over processes: by DDP, perhaps with another exchange, or by the optimizer's engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sst2_xlmr.training.optimizer import AdamW
from sst2_xlmr.util.distributed import World

# Takes a bucket of DDP's; returns its average over all ranks.
Exchange = Callable[[dist.GradBucket], "torch.futures.Future[torch.Tensor]"]


@dataclass(frozen=True)
class Computation:
    """How the model is computed.

    Attributes:
        model: gives logits; the classifier itself, or another forward pass over the same parameters.
        exchange: averages DDP's gradients; None for the backend's own all-reduce.
        why_not_compiled: why nothing but torch's own operations computes; empty if something does.
    """

    model: nn.Module
    exchange: Exchange | None = None
    why_not_compiled: str = ""


def connect(computation: Computation, optimizer: AdamW, world: World) -> nn.Module:
    """Return the model to train: under DDP where there are several processes, unless the optimizer averages itself."""
    if world.world_size == 1 or optimizer.engine.averages:
        return computation.model
    return wrap_model(computation.model, world, computation.exchange)


def wrap_model(model: nn.Module, world: World, exchange: Exchange | None) -> DistributedDataParallel:
    """Return the model under DistributedDataParallel."""
    device_ids = [world.device] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    if exchange is not None:
        # A lambda, because DDP compares a hook's annotations with its own types, and ours are strings.
        wrapped.register_comm_hook(None, lambda _, bucket: exchange(bucket))
    settle_buckets(wrapped, world.device)
    return wrapped


def settle_buckets(model: DistributedDataParallel, device: torch.device) -> None:
    """Run one backward pass in advance, because DDP rebuilds its buckets after the first one.

    With three or more processes the order of summation depends on the buckets, so that the first step after a resume
    would differ in the last bit from the same step of a run that was not interrupted.
    """
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    model(torch.zeros(1, 2, dtype=torch.int64, device=device), padded=False).float().sum().backward()
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(cpu_state)
    if cuda_state is not None:
        torch.cuda.set_rng_state(cuda_state, device)
