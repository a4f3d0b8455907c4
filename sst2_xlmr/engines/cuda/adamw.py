"""AdamW's update as one compiled pass over memory, instead of one per operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sst2_xlmr.training.flat_engine import FlatEngine, update_flat
from sst2_xlmr.training.master_weights import TrainedSlot, split_master

_PROBE_ELEMENTS = 1000
_WHOLE = 1 << 40  # one pass has no intermediate results that parts would save


def compiled_engine(trained: Sequence[TrainedSlot]) -> FlatEngine:
    """Return the plain engine with its update compiled; ask `why_not_compiled` first."""
    return FlatEngine(trained, torch.compile(update_flat, dynamic=True), _WHOLE)


def why_not_compiled(device: torch.device, bf16: bool) -> str:
    """Return why torch.compile cannot make the update on a device, in one line; an empty string if it can.

    The update itself is tried, and its result compared: that something else compiles says little (torch 2.3 takes
    Triton code for a bitcast of 16 bits that Triton refuses).
    """
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(_PROBE_ELEMENTS, generator=generator) for _ in range(4)]
    gradient, exp_avg, exp_avg_sq, master = (value.to(device) for value in values)
    working, low = split_master(master) if bf16 else (master, None)
    gradient = gradient.to(working.dtype)
    scalars = torch.tensor([0.5, 0.001, 0.01, 1e-6], device=device)
    results = []
    try:
        for update in (update_flat, torch.compile(update_flat, dynamic=True)):
            average, square, weights = exp_avg.clone(), exp_avg_sq.abs(), working.clone()
            update(gradient, average, square, weights, None if low is None else low.clone(), scalars)
            results.append((average, square, weights))
        torch.testing.assert_close(results[1], results[0])
    except Exception as error:  # of any kind: the plain engine remains
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return f"torch.compile: {lines[0]}"
    return ""
