"""Parameters with fp32 master weights: bf16 weights that the model computes with, and the bits that they lack."""

from dataclasses import dataclass

import torch
from torch import nn

from sst2_xlmr.util.tensors import LazyTensor


def store_master(master: torch.Tensor, weight: torch.Tensor, low_bits: torch.Tensor) -> None:
    """Store fp32 weights as bf16 weights, rounded to nearest, and int16 values that have the rest of their bits.

    A bf16 value has the upper 16 bits of an fp32 value.
    """
    bits = master.view(torch.int32)
    rounded = (bits + 0x8000).bitwise_and_(-0x10000)  # ties go away from zero, so that the rest fits into int16
    weight.copy_(rounded.view(torch.float32))
    low_bits.copy_(bits - rounded)


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `store_master` stores."""
    weight, low_bits = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    store_master(master, weight, low_bits)
    return weight, low_bits


def join_master(weight: torch.Tensor, low_bits: torch.Tensor) -> torch.Tensor:
    """Return the fp32 weights that `store_master` was given, bit for bit."""
    return (weight.float().view(torch.int32) + low_bits).view(torch.float32)


@dataclass
class ParamState:
    """One parameter, and all that AdamW keeps for it."""

    name: str
    weight: nn.Parameter  # what the model computes with; bf16 or fp32
    low_bits: torch.Tensor | None = None  # int16, what a bf16 weight lacks of its fp32 master (see `store_master`)
    exp_avg: torch.Tensor | None = None  # fp32 moments; None if it is not trained
    exp_avg_sq: torch.Tensor | None = None
    lr_scale: float = 1.0  # of its group, like its decay
    weight_decay: float = 0.0
    accumulator: torch.Tensor | None = None  # fp32 sum of the micro-batches' gradients, made when first needed

    def load(self, master: torch.Tensor) -> None:
        if self.low_bits is None:
            self.weight.data.copy_(master)
        else:
            store_master(master, self.weight.data, self.low_bits)

    def master(self) -> LazyTensor:
        """Return the fp32 weights, to be written; in bf16 they are joined some rows at a time."""
        weight, low_bits = self.weight.data, self.low_bits

        def rows(start: int, stop: int) -> torch.Tensor:
            part = weight[start:stop]
            return part if low_bits is None else join_master(part, low_bits[start:stop])

        return LazyTensor(tuple(weight.shape), torch.float32, rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what a step changes, by the names in the C struct."""
        named = {"weights": self.weight.data, "low": self.low_bits, "mean": self.exp_avg, "square": self.exp_avg_sq}
        return {name: tensor for name, tensor in named.items() if tensor is not None}
