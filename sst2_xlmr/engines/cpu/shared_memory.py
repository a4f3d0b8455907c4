"""Memory that all processes of one machine map, so that those that train on its CPU need not send each other anything.

Under DistributedDataParallel every process copies its gradients into buckets, sends them through the loopback device,
and makes the whole optimizer step: on a CPU, all of that is time of the same cores. Here weights, moments and gradients
lie in one place. A process leaves the gradient of its rows there, then updates its part of all weights from everybody's
gradients (as ZeRO divides the optimizer's work, https://arxiv.org/abs/1910.02054, without its communication).
"""

import contextlib
import mmap
import os
import secrets
from pathlib import Path

import torch

from sst2_xlmr.util.distributed import World, broadcast, gather_objects, sum_over_ranks

ALIGNMENT = 64  # bytes; of every tensor, so that no two share a cache line


def shared_bytes(world: World, size: int) -> mmap.mmap | None:
    """Return `size` bytes and a few more, zeros at first, that all processes see; every rank must call it.

    None on every rank if they are not all on one Linux machine, where each sees the others' processes, or if Python was
    built without `os.memfd_create`.
    """
    if world.world_size != world.local_world_size:
        return None
    file, address, mapped = -1, None, None
    token = secrets.token_bytes(ALIGNMENT)
    if world.rank == 0:
        with contextlib.suppress(OSError, AttributeError):  # memfd_create is Linux's
            # Not in /dev/shm, which containers often limit to 64 MB.
            file = os.memfd_create("sst2_xlmr")
            os.ftruncate(file, size + len(token))
            os.pwrite(file, token, size)
            address = (f"/proc/{os.getpid()}/fd/{file}", token)
    address = broadcast(world, address)
    if address is not None:
        path, token = address
        with contextlib.suppress(OSError, ValueError), Path(path).open("r+b", buffering=0) as opened:
            mapped = mmap.mmap(opened.fileno(), size + len(token))
    # In a container of its own, a process may find another file by that name.
    agreed = all(gather_objects(world, mapped is not None and mapped[size:] == token))
    if file >= 0:
        os.close(file)
    return mapped if agreed else None


def aligned_bytes(tensors: list[torch.Tensor]) -> int:
    """Return how many bytes tensors take in shared memory, each from a multiple of ALIGNMENT on."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    return sum(size + -size % ALIGNMENT for size in sizes)


def tensors_in(memory: mmap.mmap, like: list[torch.Tensor], offset: int = 0) -> list[torch.Tensor]:
    """Return tensors of the shapes and dtypes of `like` in shared memory, one after another from byte `offset` on."""
    places = []
    for tensor in like:
        place = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        places.append(place.view(tensor.shape))
        offset += aligned_bytes([tensor])
    return places


def barrier_sum(world: World, value: float = 0.0) -> float:
    """Return the sum of all ranks' values, once all have come here; what they wrote before can be read."""
    return float(sum_over_ranks(world, torch.tensor(value, dtype=torch.float64)))
