"""The optimizer's update as one compiled pass over a tensor, instead of an operation after the other."""

from __future__ import annotations

import torch

from sst2_xlmr.training.optimizer import TensorByTensor, update_tensor


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works on a device; on CUDA it needs Triton."""
    try:
        tensor = torch.ones(16, device=device)
        return bool(torch.compile(lambda x: x + 1)(tensor).sum() == 32)
    except Exception:  # of any kind: the plain engine remains
        return False


def compiled_engine() -> TensorByTensor:
    """Return the plain engine with its update compiled; check `can_compile` first."""
    return TensorByTensor(torch.compile(update_tensor, dynamic=True))
