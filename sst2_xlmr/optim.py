"""AdamW with fp32 master weights, parameter groups, learning-rate schedule."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist
from torch import nn

from sst2_xlmr.compact_vocab import TABLE_NAME

BETA1, BETA2 = 0.9, 0.999
# RoBERTa's (https://arxiv.org/abs/1907.11692, table 10). With Adam's 1e-8, a weight whose gradient is only rounding
# noise (the attention's key bias has none in exact arithmetic) would take whole steps in random directions.
EPSILON = 1e-6


def lr_factor(step: int, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """Return the share of the peak rate at which optimizer step `step` (from 0) is made.

    Warm-up rises linearly and reaches 1 at its last step; linear and cosine then fall towards 0, which they would
    reach one step after the last, so that no step is made at a rate of 0.
    """
    warmup_steps = math.ceil(total_steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def lr_scale(name: str, layers: int, decay: float) -> float:
    """Return decay ** (distance from the head): 0 for the head, 1 for the last layer, layers + 1 for embeddings."""
    if name.startswith("head."):
        return 1.0
    parts = name.split(".")
    depth = int(parts[parts.index("layers") + 2]) if "layers" in parts else -1
    return decay ** (layers - depth)


@dataclass
class Slot:
    """One parameter and all that AdamW keeps for it.

    Attributes:
        name: the parameter's.
        working: what the model computes with; bf16 or fp32.
        master: fp32 weights; the parameter's own tensor in fp32.
        exp_avg, exp_avg_sq: fp32 moments, None for a frozen parameter.
        accumulator: fp32 sum of the micro-batches' gradients, made when first needed.
        weight_decay, lr_scale: as its group has them.
    """

    name: str
    working: nn.Parameter
    master: torch.Tensor
    exp_avg: torch.Tensor | None
    exp_avg_sq: torch.Tensor | None
    weight_decay: float
    lr_scale: float
    accumulator: torch.Tensor | None = None


def _update(
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    master: torch.Tensor,
    working: torch.Tensor,
    scalars: torch.Tensor,
) -> None:
    """One AdamW step (https://arxiv.org/abs/1711.05101) of one tensor, written so that compiling makes it one pass.

    Args:
        gradient: bf16 or fp32, any shape; the other tensors have the same.
        scalars: fp32 [4]: gradient scale, lr * weight decay, lr / bias correction 1, 1 / sqrt(bias correction 2).
    """
    gradient = gradient.float() * scalars[0]
    average = exp_avg * BETA1 + gradient * (1 - BETA1)
    square = exp_avg_sq * BETA2 + gradient * gradient * (1 - BETA2)
    # Subtracted, not multiplied by 1 - lr * decay: that factor, in fp32, is often exactly 1.
    weights = master - master * scalars[1] - scalars[2] * average / (square.sqrt() * scalars[3] + EPSILON)
    exp_avg.copy_(average)
    exp_avg_sq.copy_(square)
    master.copy_(weights)
    if working is not master:
        working.copy_(weights)


def _square_sum(gradient: torch.Tensor) -> torch.Tensor:
    """Return the fp32 sum of squares, also of bf16."""
    return gradient.float().square().sum()


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; on a CPU it needs a C++ compiler, which many clusters' nodes lack."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch speaks of a missing CUDA runtime here
            tensor = torch.ones(16, device=device)
            return bool(torch.compile(lambda x: x + 1)(tensor).sum() == 32)
    except Exception:  # whatever its backend raises, the eager way remains
        return False


class AdamW:
    """AdamW over a model's parameters, with fp32 masters.

    With `bf16`, the model's parameters become bf16 copies of the masters. One compiled pass per tensor reads the
    gradient and writes moments, master and working copy; it is memory-bound, and several passes cost several times
    as much. Without `compile_step` the same function runs eagerly.

    Attributes:
        slots: per parameter, in the model's order.
        is_compiled: whether the pass is compiled.
        steps: how many steps were made.
        table_decay: product over all steps of what weight decay leaves of an embedding row without gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: int,
        weight_decay: float,
        layerwise_lr_decay: float,
        max_grad_norm: float,
        bf16: bool,
        compile_step: bool,
    ) -> None:
        self.max_grad_norm = max_grad_norm
        self.steps = 0
        self.table_decay = 1.0
        self.slots: list[Slot] = []
        for name, parameter in model.named_parameters():
            master = parameter.detach()
            if bf16:
                parameter.data = master.bfloat16()
            trained = parameter.requires_grad
            # Biases and LayerNorm, the only vectors, are not decayed: the convention since BERT.
            decay = weight_decay if parameter.dim() > 1 else 0.0
            scale = lr_scale(name, layers, layerwise_lr_decay)
            first, second = (torch.zeros_like(master) if trained else None for _ in range(2))
            self.slots.append(Slot(name, parameter, master, first, second, decay, scale))
        self.is_compiled = compile_step
        self._update: Callable[..., None] = _update
        self._square_sum: Callable[[torch.Tensor], torch.Tensor] = _square_sum
        if self.is_compiled:
            self._update = torch.compile(_update, dynamic=True)
            self._square_sum = torch.compile(_square_sum, dynamic=True)

    def trained(self) -> Iterator[tuple[Slot, torch.Tensor, torch.Tensor]]:
        """Yield (slot, first moment, second moment) of the parameters that are trained."""
        for slot in self.slots:
            if slot.exp_avg is not None and slot.exp_avg_sq is not None:
                yield slot, slot.exp_avg, slot.exp_avg_sq

    def accumulate(self) -> None:
        """Add the gradients to fp32 accumulators and clear them: bf16 sums would lose small micro-batches' bits."""
        for slot, _, _ in self.trained():
            assert slot.working.grad is not None
            if slot.accumulator is None:
                slot.accumulator = torch.zeros_like(slot.master)
            slot.accumulator += slot.working.grad
            slot.working.grad = None

    def average_accumulated(self, world_size: int) -> None:
        """Average the accumulators over all ranks, as DDP does with gradients."""
        for slot, _, _ in self.trained():
            if world_size > 1 and slot.accumulator is not None:
                dist.all_reduce(slot.accumulator)
                slot.accumulator /= world_size

    @torch.no_grad()
    def step(self, lr: float, accumulated: bool) -> torch.Tensor:
        """Make one step, and clear the gradients.

        Args:
            lr: the rate of this step, before layer-wise decay.
            accumulated: whether the gradients lie in the accumulators.

        Returns:
            The gradient's global norm before clipping; fp32, no dimensions.
        """
        self.steps += 1
        trained = list(self.trained())
        gradients = [slot.accumulator if accumulated else slot.working.grad for slot, _, _ in trained]
        norm = torch.stack([self._square_sum(g.view(-1)) for g in gradients if g is not None]).sum().sqrt()
        scale = torch.ones_like(norm)
        if self.max_grad_norm:
            scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        correction1, correction2 = 1 - BETA1**self.steps, 1 - BETA2**self.steps
        scalars: dict[tuple[float, float], torch.Tensor] = {}
        for (slot, exp_avg, exp_avg_sq), gradient in zip(trained, gradients):
            assert gradient is not None
            group = (slot.lr_scale, slot.weight_decay)
            if group not in scalars:
                rate = lr * slot.lr_scale
                fixed = [rate * slot.weight_decay, rate / correction1, 1 / math.sqrt(correction2)]
                scalars[group] = torch.cat([scale.view(1), torch.tensor(fixed).to(norm.device, non_blocking=True)])
            if slot.name == TABLE_NAME:
                self.table_decay *= 1 - lr * slot.lr_scale * slot.weight_decay
            flat = [gradient, exp_avg, exp_avg_sq, slot.master]
            views = [tensor.view(-1) for tensor in flat]
            working = views[3] if slot.working.dtype == torch.float32 else slot.working.data.view(-1)
            self._update(*views, working, scalars[group])
            slot.working.grad = None
            if accumulated:
                gradient.zero_()
        return norm

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the moments by name, for a checkpoint (`steps` is the training step)."""
        tensors = {}
        for slot, exp_avg, exp_avg_sq in self.trained():
            tensors[f"exp_avg.{slot.name}"] = exp_avg
            tensors[f"exp_avg_sq.{slot.name}"] = exp_avg_sq
        return tensors

    def master_tensors(self) -> dict[str, torch.Tensor]:
        """Return the fp32 weights by the parameters' names."""
        return {slot.name: slot.master for slot in self.slots}

    @torch.no_grad()
    def load(
        self, masters: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], steps: int, table_decay: float
    ) -> None:
        """Take over weights, moments and what was counted from a checkpoint."""
        self.steps, self.table_decay = steps, table_decay
        for slot in self.slots:
            slot.master.copy_(masters[slot.name])
            slot.working.data.copy_(slot.master)
        for name, tensor in self.state_tensors().items():
            tensor.copy_(moments[name])
