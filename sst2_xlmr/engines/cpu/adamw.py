"""AdamW's norm and update in C, one pass over memory each; several processes of one machine can share the work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from sst2_xlmr.engines.cpu.kernels import PARAMETER, Gradients, Kernels
from sst2_xlmr.engines.cpu.shared_memory import Meeting, Places, aligned_bytes, shared_bytes
from sst2_xlmr.training.flat_engine import BETA1, BETA2, EPSILON, Rates
from sst2_xlmr.training.master_weights import TrainedSlot
from sst2_xlmr.util.distributed import World, shared_error
from sst2_xlmr.util.memory import give_back_memory


def part_of(n: int, team: World) -> tuple[int, int]:
    """Return which of n values, from one to before another, this rank updates: whole blocks of 64, as threads do."""
    blocks = -(-n // 64)
    start, stop = (blocks * rank // team.world_size * 64 for rank in (team.rank, team.rank + 1))
    return min(start, n), min(stop, n)


class CpuEngine:
    """Carries out `AdamW` with the kernels.

    The processes of a team share the memory of all weights, moments and gradients. Each has the gradient of its own
    rows; all average them in the same order, and each updates its part of the weights.

    Args:
        team: the processes that step together (see `share_memory`); one alone needs nothing shared.
    """

    def __init__(self, kernels: Kernels, trained: Sequence[TrainedSlot], team: World) -> None:
        self.averages = team.world_size > 1
        self._kernels, self._trained, self._team, self._meeting = kernels, trained, team, Meeting(team)
        parts = [part_of(slot.working.numel(), team) for slot in trained]
        self._starts = [start for start, _ in parts]
        # What this rank updates; gradients and rates are filled in at every step.
        self._parameters = np.zeros(len(parts), PARAMETER)
        for entry, slot, (start, stop) in zip(self._parameters, trained, parts):
            tensors = {"weights": slot.working.data, "low": slot.low, "mean": slot.exp_avg, "square": slot.exp_avg_sq}
            for name, tensor in tensors.items():
                entry[name] = 0 if tensor is None else tensor.data_ptr() + start * tensor.element_size()
            entry["n"] = stop - start
        self._gradients: list[torch.Tensor] = []

    def new_accumulators(self) -> list[torch.Tensor]:
        if not self.averages:
            return [torch.zeros_like(slot.working.data, dtype=torch.float32) for slot in self._trained]
        shapes = [torch.empty_like(slot.working.data, dtype=torch.float32, device="meta") for slot in self._trained]
        memory = shared_bytes(self._team, self._team.world_size * aligned_bytes(shapes))
        if memory is None:
            raise shared_error("no memory to share for the sums of micro-batches; leave out --micro-batch-size")
        return Places(memory).take_for_ranks(self._team, shapes)

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Tell the kernels where the gradients of all ranks are, given this rank's, and return their norm."""
        size, stride = gradients[0].element_size(), aligned_bytes(gradients)
        self._parameters["grad"] = [
            gradient.data_ptr() - self._team.rank * stride + start * size
            for gradient, start in zip(gradients, self._starts)
        ]
        self._gradients = gradients  # kept: the kernels have their addresses
        self._located = Gradients(stride, self._team.world_size, gradients[0].dtype == torch.float32)
        self._meeting.sum(0)  # the gradients of all are there
        square_sum = self._meeting.sum(self._kernels.square_sum(self._parameters, self._located))
        return torch.tensor(math.sqrt(square_sum))

    def update(self, scale: torch.Tensor, rates: list[Rates], root: float) -> None:
        self._parameters["rate"] = [rate.update for rate in rates]
        self._parameters["decay"] = [rate.decay for rate in rates]
        self._kernels.adamw(self._parameters, self._located, float(scale), (BETA1, BETA2), EPSILON, root)
        self._gradients = []
        self._meeting.sum(0)  # all parts are updated


@torch.no_grad()
def share_memory(trained: Sequence[TrainedSlot], world: World) -> bool:
    """Move weights, moments and gradients to memory that all ranks see; every rank must call it, with the same state.

    Returns:
        False if there is no such memory (see `shared_bytes`); then nothing has changed.
    """
    state_bytes = aligned_bytes([tensor for slot in trained for tensor in slot.tensors()])
    gradient_bytes = aligned_bytes([slot.working.data for slot in trained])
    memory = shared_bytes(world, state_bytes + world.world_size * gradient_bytes)
    if memory is None:
        return False
    places = Places(memory)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        place = places.take(tensor)
        return place.copy_(tensor) if world.is_main else place

    for slot in trained:
        slot.working.data = moved(slot.working.data)
        slot.low = None if slot.low is None else moved(slot.low)
        slot.exp_avg, slot.exp_avg_sq = moved(slot.exp_avg), moved(slot.exp_avg_sq)
    gradients = places.take_for_ranks(world, [slot.working.data for slot in trained])
    for slot, place in zip(trained, gradients):
        slot.working.register_post_accumulate_grad_hook(partial(_leave_gradient, place))
    Meeting(world).sum(0)  # rank 0 has copied everything
    give_back_memory()
    return True


def _leave_gradient(place: torch.Tensor, parameter: torch.Tensor) -> None:
    """Move a gradient that autograd has just made to `place`, where autograd adds to it, if there is more."""
    if parameter.grad is not place:
        assert parameter.grad is not None
        parameter.grad = place.copy_(parameter.grad)
