"""AdamW with fp32 master weights, parameter groups, learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from sst2_xlmr.distributed import World, shared_error
from sst2_xlmr.engines.cpu.kernels import PARAMETER, Gradients, Kernels
from sst2_xlmr.engines.cpu.shared_memory import Meeting, Places, aligned_bytes, shared_bytes
from sst2_xlmr.memory import give_back_memory
from sst2_xlmr.model.compact_vocab import TABLE_NAME

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


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp32 weights as bf16 weights, rounded to nearest, and int16 values that have the rest of their bits."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16  # ties go away from zero, so that the rest fits into int16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(weights: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Return the fp32 weights that `split_master` was given, bit for bit."""
    return ((weights.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def part_of(n: int, world: World) -> tuple[int, int]:
    """Return which of n values, from one to before another, this rank updates: whole blocks of 64, as threads do."""
    blocks = -(-n // 64)
    start, stop = (blocks * rank // world.world_size * 64 for rank in (world.rank, world.rank + 1))
    return min(start, n), min(stop, n)


@dataclass
class Slot:
    """One parameter and all that AdamW keeps for it.

    Attributes:
        name: the parameter's.
        working: what the model computes with; bf16 or fp32.
        low: int16, in bf16 what `working` lacks of the fp32 master weights (see `split_master`); None in fp32.
        exp_avg, exp_avg_sq: fp32 moments, None for a frozen parameter.
        accumulator: fp32 sum of the micro-batches' gradients, made when first needed.
        weight_decay, lr_scale: as its group has them.
    """

    name: str
    working: nn.Parameter
    low: torch.Tensor | None
    exp_avg: torch.Tensor | None
    exp_avg_sq: torch.Tensor | None
    weight_decay: float
    lr_scale: float
    accumulator: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Return all but the accumulator."""
        found = (self.working.data, self.low, self.exp_avg, self.exp_avg_sq)
        return [tensor for tensor in found if tensor is not None]

    def master(self) -> torch.Tensor:
        """Return the fp32 weights: a copy in bf16, the parameter's own tensor in fp32."""
        return self.working.data if self.low is None else join_master(self.working.data, self.low)

    def set_master(self, master: torch.Tensor) -> None:
        if self.low is None:
            self.working.data.copy_(master)
        else:
            for target, half in zip((self.working.data, self.low), split_master(master)):
                target.copy_(half)


def _update(
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    working: torch.Tensor,
    low: torch.Tensor | None,
    scalars: torch.Tensor,
) -> None:
    """One AdamW step (https://arxiv.org/abs/1711.05101) of one tensor, as `adamw` in cpu_kernels.c makes it.

    Args:
        gradient: bf16 or fp32, any shape; the other tensors have the same.
        scalars: fp32 [4]: gradient scale, lr * weight decay, lr / bias correction 1, 1 / sqrt(bias correction 2).
    """
    gradient = gradient.float() * scalars[0]
    average = exp_avg * BETA1 + gradient * (1 - BETA1)
    square = exp_avg_sq * BETA2 + gradient * gradient * (1 - BETA2)
    master = working if low is None else join_master(working, low)
    # Subtracted, not multiplied by 1 - lr * decay: that factor, in fp32, is often exactly 1.
    master = master - master * scalars[1] - scalars[2] * average / (square.sqrt() * scalars[3] + EPSILON)
    exp_avg.copy_(average)
    exp_avg_sq.copy_(square)
    if low is None:
        working.copy_(master)
    else:
        for target, half in zip((working, low), split_master(master)):
            target.copy_(half)


def _leave_gradient(place: torch.Tensor, parameter: torch.Tensor) -> None:
    """Move a gradient that autograd has just made to `place`, where autograd adds to it, if there is more."""
    if parameter.grad is not place:
        assert parameter.grad is not None
        parameter.grad = place.copy_(parameter.grad)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works on a CUDA device; it needs Triton."""
    try:
        tensor = torch.ones(16, device=device)
        return bool(torch.compile(lambda x: x + 1)(tensor).sum() == 32)
    except Exception:  # whatever its backend raises, the eager way remains
        return False


class AdamW:
    """AdamW over a model's parameters, with fp32 masters.

    With `bf16`, the model's parameters become bf16, and the optimizer keeps the bits that they lack. A step is one
    pass over memory: it reads the gradient and writes moments and weights. On a CPU that is `cpu_kernels`, on CUDA a
    compiled function; without either the same is done operation by operation, several times as slowly. Processes of
    one machine's CPU can do it together (`share_memory`).

    Attributes:
        slots: per parameter, in the model's order.
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
        kernels: Kernels | None = None,
        compile_step: bool = False,
    ) -> None:
        self.max_grad_norm = max_grad_norm
        self.steps = 0
        self.table_decay = 1.0
        self.slots: list[Slot] = []
        for name, parameter in model.named_parameters():
            low = None
            trained = parameter.requires_grad
            # Biases and LayerNorm, the only vectors, are not decayed: the convention since BERT.
            decay = weight_decay if parameter.dim() > 1 else 0.0
            scale = lr_scale(name, layers, layerwise_lr_decay)
            first, second = (torch.zeros_like(parameter.data) if trained else None for _ in range(2))
            if bf16:
                parameter.data, low = split_master(parameter.data)
            self.slots.append(Slot(name, parameter, low, first, second, decay, scale))
        self._kernels = kernels
        self._update: Callable[..., None] = torch.compile(_update, dynamic=True) if compile_step else _update
        self._world = World(0, 1, 0, 1, torch.device("cpu"))  # those that make a step together
        self._meeting = Meeting(self._world)
        self._arguments = self._describe()

    @property
    def shares_memory(self) -> bool:
        """Whether all processes update the same weights together (see `share_memory`)."""
        return self._world.world_size > 1

    def _describe(self) -> np.ndarray:
        """Return what this rank updates for `Kernels.adamw`; gradients and rates are filled in at every step."""
        parts = [part_of(weights.numel(), self._world) for weights in self._weights()]
        self._starts = [start for start, _ in parts]
        arguments = np.zeros(len(parts), PARAMETER)
        for line, (slot, exp_avg, exp_avg_sq), (start, stop) in zip(arguments, self.trained(), parts):
            tensors = {"weights": slot.working.data, "low": slot.low, "mean": exp_avg, "square": exp_avg_sq}
            for name, tensor in tensors.items():
                line[name] = 0 if tensor is None else tensor.data_ptr() + start * tensor.element_size()
            line["n"] = stop - start
        return arguments

    @torch.no_grad()
    def share_memory(self, world: World) -> bool:
        """Move weights, moments and gradients to memory that all ranks see, and from now on step together.

        Every rank must call this, all with the same state. Each has the gradient of its rows then, not averaged;
        `gradient_norm` and `step` wait for the others.

        Returns:
            False if there are no kernels, or no such memory (see `shared_bytes`); then nothing has changed.
        """
        if self._kernels is None or world.world_size == 1:
            return False
        slots = [slot for slot, _, _ in self.trained()]
        size = aligned_bytes([tensor for slot in slots for tensor in slot.tensors()])
        memory = shared_bytes(world, size + world.world_size * aligned_bytes([*self._weights()]))
        if memory is None:
            return False
        places = Places(memory)

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            place = places.take(tensor)
            return place.copy_(tensor) if world.is_main else place

        for slot, exp_avg, exp_avg_sq in list(self.trained()):
            slot.working.data = moved(slot.working.data)
            slot.low = None if slot.low is None else moved(slot.low)
            slot.exp_avg, slot.exp_avg_sq = moved(exp_avg), moved(exp_avg_sq)
        for slot, place in zip(slots, places.take_for_ranks(world, [*self._weights()])):
            slot.working.register_post_accumulate_grad_hook(partial(_leave_gradient, place))
        self._world, self._meeting = world, Meeting(world)
        self._arguments = self._describe()
        self._meeting.sum(0)
        give_back_memory()
        return True

    def _weights(self) -> Iterator[torch.Tensor]:
        return (slot.working.data for slot, _, _ in self.trained())

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
                self._make_accumulators()
            assert slot.accumulator is not None
            slot.accumulator += slot.working.grad
            slot.working.grad = None

    def _make_accumulators(self) -> None:
        weights = [*self._weights()]
        if not self.shares_memory:
            sums = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in weights]
        else:
            shapes = [torch.empty_like(tensor, dtype=torch.float32, device="meta") for tensor in weights]
            memory = shared_bytes(self._world, self._world.world_size * aligned_bytes(shapes))
            if memory is None:
                raise shared_error("no memory to share for the sums of micro-batches; leave --micro-batch-size away")
            sums = Places(memory).take_for_ranks(self._world, shapes)
        for (slot, _, _), accumulator in zip(self.trained(), sums):
            slot.accumulator = accumulator

    def average_accumulated(self, world_size: int) -> None:
        """Average the accumulators over all ranks, as DDP does with gradients; not needed if they share memory."""
        if world_size == 1 or self.shares_memory:
            return
        for slot, _, _ in self.trained():
            if slot.accumulator is not None:
                dist.all_reduce(slot.accumulator)
                slot.accumulator /= world_size

    def _gradients(self, accumulated: bool) -> list[torch.Tensor]:
        gradients = [slot.accumulator if accumulated else slot.working.grad for slot, _, _ in self.trained()]
        return [gradient.contiguous() for gradient in gradients if gradient is not None]

    @torch.no_grad()
    def gradient_norm(self, accumulated: bool = False) -> torch.Tensor:
        """Return the gradient's global norm; fp32, no dimensions.

        Args:
            accumulated: whether the gradients lie in the accumulators.
        """
        gradients = self._gradients(accumulated)
        if self._kernels is None:
            return torch.stack([gradient.float().square().sum() for gradient in gradients]).sum().sqrt()
        where = self._locate(gradients)
        self._meeting.sum(0)  # everybody's gradients are there
        return torch.tensor(math.sqrt(self._meeting.sum(self._kernels.square_sum(self._arguments, where))))

    def _locate(self, gradients: list[torch.Tensor]) -> Gradients:
        """Tell the kernels where the gradients of all ranks are, given this rank's."""
        world, size = self._world, gradients[0].element_size()
        stride = aligned_bytes(gradients)
        self._arguments["grad"] = [
            gradient.data_ptr() - world.rank * stride + start * size for gradient, start in zip(gradients, self._starts)
        ]
        return Gradients(stride, world.world_size, gradients[0].dtype == torch.float32)

    @torch.no_grad()
    def step(self, lr: float, norm: torch.Tensor, accumulated: bool = False) -> None:
        """Make one step with the gradient clipped, and clear the gradients.

        Args:
            lr: the rate of this step, before layer-wise decay.
            norm: the gradient's global norm.
            accumulated: whether the gradients lie in the accumulators.
        """
        self.steps += 1
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_grad_norm else torch.ones_like(norm)
        correction1, root = 1 - BETA1**self.steps, 1 / math.sqrt(1 - BETA2**self.steps)
        trained = list(self.trained())
        rates = [(lr * slot.lr_scale / correction1, lr * slot.lr_scale * slot.weight_decay) for slot, _, _ in trained]
        gradients = self._gradients(accumulated)
        if self._kernels is not None:
            self._arguments["rate"], self._arguments["decay"] = zip(*rates)
            where = self._locate(gradients)
            self._kernels.adamw(self._arguments, where, float(scale), (BETA1, BETA2), EPSILON, root)
            self._meeting.sum(0)  # everybody's part is updated
        else:
            scalars = {}
            for group in set(rates):
                fixed = torch.tensor([group[1], group[0], root]).to(norm.device, non_blocking=True)
                scalars[group] = torch.cat([scale.view(1), fixed])
            for (slot, exp_avg, exp_avg_sq), gradient, group in zip(trained, gradients, rates):
                flat = [tensor.view(-1) for tensor in (gradient, exp_avg, exp_avg_sq, slot.working.data)]
                self._update(*flat, None if slot.low is None else slot.low.view(-1), scalars[group])
        for slot, _, _ in trained:
            if slot.name == TABLE_NAME:
                self.table_decay *= 1 - lr * slot.lr_scale * slot.weight_decay
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Forget the gradients, also those that were accumulated."""
        for slot, _, _ in self.trained():
            slot.working.grad = None
            if slot.accumulator is not None:
                slot.accumulator.zero_()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the moments by name, for a checkpoint (`steps` is the training step)."""
        tensors = {}
        for slot, exp_avg, exp_avg_sq in self.trained():
            tensors[f"exp_avg.{slot.name}"] = exp_avg
            tensors[f"exp_avg_sq.{slot.name}"] = exp_avg_sq
        return tensors

    def master_tensors(self) -> dict[str, torch.Tensor]:
        """Return the fp32 weights by the parameters' names."""
        return {slot.name: slot.master() for slot in self.slots}

    @torch.no_grad()
    def load(
        self, masters: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], steps: int, table_decay: float
    ) -> None:
        """Take over weights, moments and what was counted from a checkpoint."""
        self.steps, self.table_decay = steps, table_decay
        for slot in self.slots:
            slot.set_master(masters[slot.name])
        for name, tensor in self.state_tensors().items():
            tensor.copy_(moments[name])
