"""Parameters with fp32 master weights: bf16 weights that the model computes with, and the bits that they lack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sst2_xlmr.util.files import Deferred


def store_master(master: torch.Tensor, weights: torch.Tensor, low: torch.Tensor) -> None:
    """Store fp32 weights as bf16 weights, rounded to nearest, and int16 values that have the rest of their bits.

    A bf16 value has the upper 16 bits of an fp32 value. They are reached through fp32 whose lower bits are zero, which
    is exact: Triton has no way from 16-bit integers to bf16 (https://github.com/pytorch/pytorch/issues/120357).
    """
    bits = master.view(torch.int32)
    rounded = (bits + 0x8000).bitwise_and_(-0x10000)  # ties go away from zero, so that the rest fits into int16
    weights.copy_(rounded.view(torch.float32))
    low.copy_(bits - rounded)


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `store_master` stores."""
    weights, low = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    store_master(master, weights, low)
    return weights, low


def join_master(weights: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Return the fp32 weights that `store_master` was given, bit for bit."""
    return (weights.float().view(torch.int32) + low).view(torch.float32)


@dataclass
class Slot:
    """One parameter and its master weights.

    Attributes:
        name: the parameter's.
        working: what the model computes with; bf16 or fp32.
        low: int16, in bf16 what `working` lacks of the fp32 master weights (see `store_master`); None in fp32.
    """

    name: str
    working: nn.Parameter
    low: torch.Tensor | None

    def master(self) -> torch.Tensor:
        """Return the fp32 weights: a copy in bf16, the parameter's own tensor in fp32."""
        return self.working.data if self.low is None else join_master(self.working.data, self.low)

    def set_master(self, master: torch.Tensor) -> None:
        if self.low is None:
            self.working.data.copy_(master)
        else:
            store_master(master, self.working.data, self.low)

    def deferred_master(self) -> Deferred:
        """Return the fp32 weights, to be written; in bf16 they are joined some rows at a time."""
        weights, low = self.working.data, self.low

        def rows(start: int, stop: int) -> torch.Tensor:
            return weights[start:stop] if low is None else join_master(weights[start:stop], low[start:stop])

        return Deferred(tuple(weights.shape), torch.float32, rows)


@dataclass
class TrainedSlot(Slot):
    """A parameter that is trained, and all that AdamW keeps for it.

    Attributes:
        exp_avg, exp_avg_sq: fp32 moments.
        weight_decay, lr_scale: of its group.
        accumulator: fp32 sum of the micro-batches' gradients, made when first needed.
    """

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    weight_decay: float
    lr_scale: float
    accumulator: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Return what a step changes."""
        tensors = (self.working.data, self.low, self.exp_avg, self.exp_avg_sq)
        return [tensor for tensor in tensors if tensor is not None]
