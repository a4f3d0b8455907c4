"""DDP's averaging of gradients between CPUs of several machines; gloo's own sum takes several times as long."""

from __future__ import annotations

import torch
import torch.distributed as dist

from sst2_xlmr.engines.cpu.kernels import Kernels
from sst2_xlmr.util.distributed import World


def exchange_gradients(world: World, kernels: Kernels, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of DDP's over all ranks; a communication hook.

    Every rank gets one part of the bucket from all others, averages it, and sends the result to them; as much is sent
    as in a ring. Ranks are added in their order, in fp32, so the result does not depend on how buckets are cut.
    """
    flat = bucket.buffer()
    parts = list(flat.tensor_split(world.world_size))
    mine = parts[world.rank]
    received = [mine if rank == world.rank else torch.empty_like(mine) for rank in range(world.world_size)]
    others = [rank for rank in range(world.world_size) if rank != world.rank]
    _exchange(parts, received, others)
    kernels.mean_of(received, mine)
    _exchange([mine] * world.world_size, parts, others)
    averaged: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    averaged.set_result(flat)
    return averaged


def _exchange(to_send: list[torch.Tensor], to_receive: list[torch.Tensor], others: list[int]) -> None:
    """Send a tensor to every other rank and receive one from it, in place; both lists have one per rank."""
    works = [dist.isend(to_send[rank], rank) for rank in others]
    works += [dist.irecv(to_receive[rank], rank) for rank in others]
    for work in works:
        assert work is not None  # it is for ranks outside the group only
        work.wait()
