"""The plain engine of `AdamW`: torch's own operations on a few long tensors, on any device.

A model has some two hundred parameters, and on a GPU the number of operations decides, not their size. So parameters
that a step treats alike lie one after another in one tensor, as do their moments: about fifteen operations update all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, NamedTuple, Protocol

import numpy as np
import torch

from sst2_xlmr.training.master_weights import TrainedSlot, join_master, store_master

BETA1, BETA2 = 0.9, 0.999
# RoBERTa's (https://arxiv.org/abs/1907.11692, table 10). With Adam's 1e-8, a weight whose gradient is only rounding
# noise (the attention's key bias has none in exact arithmetic) would take whole steps in random directions.
EPSILON = 1e-6

# Elements that are updated together. On a CPU what one operation writes should be in the cache for the next; on a GPU
# this bounds the memory for intermediate results, some 16 bytes each.
_CPU_CHUNK, _GPU_CHUNK = 1 << 19, 1 << 27


class Rates(NamedTuple):
    """What a step multiplies with, for one parameter.

    Attributes:
        update: learning rate / (1 - BETA1 ** steps).
        decay: learning rate * weight decay.
    """

    update: float
    decay: float


class Engine(Protocol):
    """What carries out the steps of `AdamW` on its trained slots."""

    averages: bool  # whether it reads the gradients of all processes and averages them itself

    def new_accumulators(self) -> list[torch.Tensor]:
        """Return fp32 zeros like the slots' weights."""

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Return the global norm of the (averaged) gradients, fp32, no dimensions.

        Args:
            gradients: bf16 or fp32, contiguous, one per slot; they stay as they are until `update`.
        """

    def update(self, scale: torch.Tensor, rates: list[Rates], root: float) -> None:
        """Change weights and moments by the gradients that `norm` was given.

        Args:
            scale: fp32, no dimensions; clips the gradients.
            rates: one per slot.
            root: 1 / sqrt(1 - BETA2 ** steps).
        """


def update_flat(
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    working: torch.Tensor,
    low: torch.Tensor | None,
    scalars: torch.Tensor,
) -> None:
    """Take one AdamW step (https://arxiv.org/abs/1711.05101), in as few operations as possible.

    Args:
        gradient: bf16 or fp32 [n], and so are the others; `low` as in `Slot`.
        scalars: fp32 [4]; see `scalars_of`.
    """
    scale, decay, rate, epsilon = scalars.split(1)
    gradient = gradient * scale  # fp32
    exp_avg.lerp_(gradient, 1 - BETA1)
    exp_avg_sq.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    master = working if low is None else join_master(working, low)
    # Subtracted, not multiplied by 1 - lr * decay: that factor, in fp32, is often exactly 1.
    master.addcmul_(master, decay, value=-1).addcdiv_(exp_avg * rate, exp_avg_sq.sqrt().add_(epsilon), value=-1)
    if low is not None:
        store_master(master, working, low)


def scalars_of(rates: Rates, root: float) -> list[float]:
    """Return the scalars of `update_flat` but for the first, the gradient's scale.

    AdamW divides rates.update * exp_avg by sqrt(exp_avg_sq) * root + EPSILON; here both sides are divided by root.
    """
    return [rates.decay, rates.update / root, EPSILON / root]


def _joined(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the tensors' values one after another, and each tensor's part of that."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    parts = flat.split([tensor.numel() for tensor in tensors])
    return flat, [part.view_as(tensor) for part, tensor in zip(parts, tensors)]


def _join_field(slots: Sequence[TrainedSlot], name: str) -> torch.Tensor:
    """Return the slots' tensors of one kind in one, of which theirs become parts."""
    flat, parts = _joined([getattr(slot, name) for slot in slots])
    for slot, part in zip(slots, parts):
        setattr(slot, name, part)
    return flat


class FlatEngine:
    """Moves the slots' tensors into long ones and updates these.

    Args:
        trained: the slots; their tensors become parts of the long ones.
        update: `update_flat`, or a compiled form of it.
        chunk: how many elements to update together; None for what suits the device.
    """

    averages = False

    def __init__(
        self, trained: Sequence[TrainedSlot], update: Callable[..., None] = update_flat, chunk: int | None = None
    ) -> None:
        self._trained, self._update = trained, update
        self._device = trained[0].working.device
        self._chunk = chunk or (_CPU_CHUNK if self._device.type == "cpu" else _GPU_CHUNK)
        # Those with the same rates side by side; tensors of odd sizes last, so that the others begin at addresses that
        # vector instructions like.
        groups: dict[tuple[float, float], list[int]] = {}
        for number in sorted(range(len(trained)), key=lambda number: trained[number].working.numel() % 8 > 0):
            groups.setdefault((trained[number].lr_scale, trained[number].weight_decay), []).append(number)
        self._order = [number for numbers in groups.values() for number in numbers]
        slots = [trained[number] for number in self._order]
        self._working, parts = _joined([slot.working.data for slot in slots])
        for slot, part in zip(slots, parts):
            slot.working.data = part
        self._exp_avg, self._exp_avg_sq = _join_field(slots, "exp_avg"), _join_field(slots, "exp_avg_sq")
        self._low = None if slots[0].low is None else _join_field(slots, "low")
        self._gradient: torch.Tensor | None = None  # flat, between `norm` and `update`
        ends = np.cumsum([sum(trained[number].working.numel() for number in numbers) for numbers in groups.values()])
        # Of every group: one of its slots, and where it lies.
        self._groups = [(numbers[0], end) for numbers, end in zip(groups.values(), ends.tolist())]

    def new_accumulators(self) -> list[torch.Tensor]:
        return [torch.zeros_like(slot.working.data, dtype=torch.float32) for slot in self._trained]

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        self._gradient = torch.cat([gradients[number].view(-1) for number in self._order])
        return torch.linalg.vector_norm(self._gradient, dtype=torch.float32)

    def update(self, scale: torch.Tensor, rates: list[Rates], root: float) -> None:
        assert self._gradient is not None
        fixed = torch.tensor([scalars_of(rates[number], root) for number, _ in self._groups])
        if self._device.type == "cuda":
            fixed = fixed.pin_memory().to(self._device, non_blocking=True)  # other memory would wait for the GPU
        scalars = torch.cat([scale.expand(len(fixed), 1), fixed], dim=1)
        start = 0
        for (_, end), own_scalars in zip(self._groups, scalars):
            for begin in range(start, end, self._chunk):
                part = slice(begin, min(begin + self._chunk, end))
                flat = (self._gradient, self._exp_avg, self._exp_avg_sq, self._working)
                low = None if self._low is None else self._low[part]
                self._update(*(tensor[part] for tensor in flat), low, own_scalars)
            start = end
        self._gradient = None
