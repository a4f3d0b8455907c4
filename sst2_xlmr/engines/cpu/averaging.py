"""Gradients averaged over the CPUs of several machines; gloo's own sum takes several times as long."""

import torch
import torch.distributed as dist

from sst2_xlmr.util.distributed import World

_BUCKET_BYTES = 25 << 20  # as much as DDP sends at once


def average_gradients(gradients: list[torch.Tensor], world: World) -> None:
    """Average tensors over all ranks, in place; all of one dtype.

    Every rank gets one part of a bucket from all others, averages it, and sends the result to them; as much is sent as
    in a ring. Ranks are added in their order, in fp32, so the result does not depend on how buckets are cut.
    """
    most, bucket = _BUCKET_BYTES // gradients[0].element_size(), []
    for number, gradient in enumerate(gradients, 1):
        bucket.append(gradient.view(-1))
        if number == len(gradients) or sum(map(len, bucket)) + gradients[number].numel() > most:
            flat = torch.cat(bucket)
            _average(flat, world)
            for tensor, averaged in zip(bucket, flat.split([len(tensor) for tensor in bucket])):
                tensor.copy_(averaged)
            bucket = []


def _average(flat: torch.Tensor, world: World) -> None:
    parts = list(flat.tensor_split(world.world_size))
    mine = parts[world.rank]
    received = [mine if rank == world.rank else torch.empty_like(mine) for rank in range(world.world_size)]
    others = [rank for rank in range(world.world_size) if rank != world.rank]
    _exchange(parts, received, others)
    total = received[0].float()
    for other in received[1:]:
        total = total + other
    mine.copy_(total / world.world_size)
    _exchange([mine] * world.world_size, parts, others)


def _exchange(to_send: list[torch.Tensor], to_receive: list[torch.Tensor], others: list[int]) -> None:
    """Send a tensor to every other rank and receive one from it, in place; both lists have one per rank."""
    works = [dist.isend(to_send[rank], rank) for rank in others]
    works += [dist.irecv(to_receive[rank], rank) for rank in others]
    for work in works:
        assert work is not None  # it is for ranks outside the group only
        work.wait()
