"""AdamW with fp32 master weights: parameter groups, clipping, and what is saved.

Its `engine` does what touches every weight at every step, the gradient's norm and the update (see flat_engine).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sst2_xlmr.model.vocabulary import TABLE_NAME
from sst2_xlmr.training.flat_engine import BETA1, BETA2, Engine, FlatEngine, Rates
from sst2_xlmr.training.master_weights import Slot, TrainedSlot, split_master
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.files import Deferred


def lr_scale(name: str, layers: int, decay: float) -> float:
    """Return decay ** distance from the head; the distance is 0 for the head and 1 + layers for the embeddings."""
    if name.startswith("head."):
        return 1.0
    parts = name.split(".")
    depth = int(parts[parts.index("layers") + 2]) if "layers" in parts else -1
    return decay ** (layers - depth)


@dataclass(frozen=True)
class Groups:
    """By what the rates of parameters differ.

    Attributes:
        layers: of the encoder.
        weight_decay: of matrices; biases and LayerNorm, the only vectors, have none: the convention since BERT.
        layerwise_lr_decay: factor on the rate for every layer further from the head.
    """

    layers: int
    weight_decay: float = 0.0
    layerwise_lr_decay: float = 1.0


class AdamW:
    """AdamW over a model's parameters, with fp32 masters.

    Attributes:
        slots: per parameter, in the model's order.
        trained: those that are trained.
        has_masters: whether the model's parameters are bf16, and the optimizer keeps the bits that they lack.
        steps: optimizer steps taken.
        table_decay: product over all steps of what weight decay leaves of an embedding row without gradient.
    """

    def __init__(self, model: nn.Module, groups: Groups, max_grad_norm: float, bf16: bool) -> None:
        """Take over a model's parameters; with `bf16` they become bf16.

        Args:
            max_grad_norm: the gradient's global norm is clipped to this; 0 for never.
        """
        self._engine: Engine | None = None
        self.steps = 0
        self.table_decay = 1.0
        self.has_masters = bf16
        self.slots: list[Slot] = []
        self._max_grad_norm = max_grad_norm
        for name, parameter in model.named_parameters():
            low = None
            if bf16:
                parameter.data, low = split_master(parameter.data)
            if parameter.requires_grad:
                decay = groups.weight_decay if parameter.dim() > 1 else 0.0
                scale = lr_scale(name, groups.layers, groups.layerwise_lr_decay)
                first, second = (torch.zeros_like(parameter.data, dtype=torch.float32) for _ in range(2))
                self.slots.append(TrainedSlot(name, parameter, low, first, second, decay, scale))
            else:
                self.slots.append(Slot(name, parameter, low))
        self.trained = [slot for slot in self.slots if isinstance(slot, TrainedSlot)]
        self._is_accumulated = False  # whether the gradients lie in the accumulators

    @property
    def engine(self) -> Engine:
        """What carries out the steps: the plain engine, unless another one has been put in its place before."""
        if self._engine is None:
            self._engine = FlatEngine(self.trained)
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = engine

    def accumulate(self) -> None:
        """Add the gradients to fp32 accumulators and clear them: bf16 sums would lose small micro-batches' bits."""
        if any(slot.accumulator is None for slot in self.trained):
            for slot, accumulator in zip(self.trained, self.engine.new_accumulators()):
                slot.accumulator = accumulator
        for slot in self.trained:
            assert slot.working.grad is not None and slot.accumulator is not None
            slot.accumulator += slot.working.grad
            slot.working.grad = None
        self._is_accumulated = True

    def average_accumulated(self, world: World) -> None:
        """Average the accumulators over all ranks, as DDP does with gradients, unless the engine does so by itself."""
        if world.world_size == 1 or self.engine.averages:
            return
        for slot in self.trained:
            if slot.accumulator is not None:
                dist.all_reduce(slot.accumulator)
                slot.accumulator /= world.world_size

    def _gradients(self) -> list[torch.Tensor]:
        gradients = [slot.accumulator if self._is_accumulated else slot.working.grad for slot in self.trained]
        return [gradient.contiguous() for gradient in gradients if gradient is not None]

    @torch.no_grad()
    def gradient_norm(self) -> torch.Tensor:
        """Return the gradient's global norm, the same on every rank, before a step; fp32, no dimensions."""
        return self.engine.norm(self._gradients())

    @torch.no_grad()
    def step(self, lr: float, norm: torch.Tensor) -> None:
        """Take one step with the gradient clipped, and clear the gradients.

        Args:
            lr: the rate of this step, before layer-wise decay.
            norm: what `gradient_norm` has returned for these gradients.
        """
        self.steps += 1
        scale = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if self._max_grad_norm else torch.ones_like(norm)
        correction1, root = 1 - BETA1**self.steps, 1 / math.sqrt(1 - BETA2**self.steps)
        rates = [
            Rates(lr * slot.lr_scale / correction1, lr * slot.lr_scale * slot.weight_decay) for slot in self.trained
        ]
        self.engine.update(scale, rates, root)
        for slot in self.trained:
            if slot.name == TABLE_NAME:
                self.table_decay *= 1 - lr * slot.lr_scale * slot.weight_decay
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Forget the gradients, also those that were accumulated."""
        self._is_accumulated = False
        for slot in self.trained:
            slot.working.grad = None
            if slot.accumulator is not None:
                slot.accumulator.zero_()

    def masters(self) -> dict[str, Deferred]:
        """Return the fp32 weights by the parameters' names, to be written."""
        return {slot.name: slot.deferred_master() for slot in self.slots}

    def moments(self) -> dict[str, torch.Tensor]:
        """Return the moments, `exp_avg.NAME` and `exp_avg_sq.NAME`."""
        moments = {}
        for slot in self.trained:
            moments[f"exp_avg.{slot.name}"] = slot.exp_avg
            moments[f"exp_avg_sq.{slot.name}"] = slot.exp_avg_sq
        return moments

    def counters(self) -> dict[str, Any]:
        """Return what else must be saved; JSON can say it."""
        return {"steps": self.steps, "table_decay": self.table_decay}

    @torch.no_grad()
    def load(
        self, masters: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], counters: dict[str, Any]
    ) -> None:
        """Take over from a checkpoint what `masters`, `moments` and `counters` have given."""
        self.steps, self.table_decay = int(counters["steps"]), float(counters["table_decay"])
        for slot in self.slots:
            slot.set_master(masters[slot.name])
        for name, tensor in self.moments().items():
            tensor.copy_(moments[name])
