"""AdamW in C, one pass over memory each for norm and update, over bf16 weights with fp32 masters or fp32 weights.

The processes of one machine share the memory of weights, moments and gradients: each has the gradient of its own rows;
all average them in the same order, and each updates its part of the weights. Processes of several machines exchange
gradients instead (see averaging.py).
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from sst2_xlmr.config import Config
from sst2_xlmr.engines.cpu.averaging import average_gradients
from sst2_xlmr.engines.cpu.kernels import GRADIENTS, PARAMETER, Kernels
from sst2_xlmr.engines.cpu.masters import ParamState, split_master
from sst2_xlmr.engines.cpu.shared_memory import aligned_bytes, barrier_sum, shared_bytes, tensors_in
from sst2_xlmr.training.optimizer import BETAS, EPSILON, group_of
from sst2_xlmr.util.device import trim_malloc
from sst2_xlmr.util.distributed import World, raise_on_all
from sst2_xlmr.util.tensors import LazyTensor


def part_of(n: int, group: World) -> tuple[int, int]:
    """Return (start, stop): the part of n values that this rank updates, whole blocks of 64, as threads do."""
    blocks = -(-n // 64)
    start, stop = (blocks * rank // group.world_size * 64 for rank in (group.rank, group.rank + 1))
    return min(start, n), min(stop, n)


class CpuAdamW:
    """The same methods as `training.optimizer.AdamW`, and the same mathematics."""

    def __init__(self, model: nn.Module, layers: int, config: Config, world: World, kernels: Kernels) -> None:
        """Take over a model's parameters, fp32; with bf16 kernels they become bf16. Every rank must call it."""
        self._world, self._kernels, self._max_norm = world, kernels, 0.0
        self._states: list[ParamState] = []
        for name, parameter in model.named_parameters():
            state = ParamState(name, parameter)
            if kernels.dtype == torch.bfloat16:
                parameter.data, state.low_bits = split_master(parameter.data)
            if parameter.requires_grad:
                for moment in ("exp_avg", "exp_avg_sq"):
                    setattr(state, moment, torch.zeros_like(parameter.data, dtype=torch.float32))
                state.lr_scale, state.weight_decay = group_of(name, parameter, layers, config)
            self._states.append(state)
        self._trained = [state for state in self._states if state.weight.requires_grad]
        self._steps, self._accumulates = 0, False
        self._gradients: list[torch.Tensor] = []  # of `clip_grad_norm`, until `step`: the kernels have their addresses
        self._places: list[torch.Tensor] = []  # in shared memory, where this rank leaves its gradients
        # Whether all processes see the same weights; else each has its own.
        self.shares_memory = world.world_size > 1 and self._share_memory()
        self._group = world if self.shares_memory else World(world.device)
        if self.shares_memory:
            self._watch_gradients()
        # What this rank updates; gradients and rates are filled in at every step.
        parts = [part_of(state.weight.numel(), self._group) for state in self._trained]
        self._starts = [start for start, _ in parts]
        self._parameters = np.zeros(len(parts), PARAMETER)
        for entry, state, (start, stop) in zip(self._parameters, self._trained, parts):
            for name, tensor in state.tensors().items():
                entry[name] = tensor.data_ptr() + start * tensor.element_size()
            entry["n"] = stop - start

    @torch.no_grad()
    def _share_memory(self) -> bool:
        """Move weights, moments and gradients to memory that all ranks see; every rank must have the same state.

        Returns False if there is no such memory (see `shared_bytes`); then nothing has changed.
        """
        world, weights = self._world, [state.weight.data for state in self._trained]
        tensors = [tensor for state in self._trained for tensor in state.tensors().values()]
        size, size_of_gradients = aligned_bytes(tensors), aligned_bytes(weights)
        memory = shared_bytes(world, size + world.world_size * size_of_gradients)
        if memory is None:
            return False
        places = iter(tensors_in(memory, tensors))

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            place = next(places)
            return place.copy_(tensor) if world.rank == 0 else place

        for state in self._trained:
            assert state.exp_avg is not None
            assert state.exp_avg_sq is not None
            state.weight.data = moved(state.weight.data)
            state.low_bits = None if state.low_bits is None else moved(state.low_bits)
            state.exp_avg, state.exp_avg_sq = moved(state.exp_avg), moved(state.exp_avg_sq)
        self._places = tensors_in(memory, weights, size + world.rank * size_of_gradients)
        barrier_sum(world)  # rank 0 has copied everything
        trim_malloc()
        return True

    def _watch_gradients(self) -> None:
        for number, state in enumerate(self._trained):
            state.weight.register_post_accumulate_grad_hook(partial(self._keep_gradient, number))

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Add up gradients in fp32 until the next step: bf16 sums would lose small micro-batches' bits."""
        if not self._accumulates and self._kernels.dtype == torch.bfloat16:
            self._accumulates = True
            if self._trained[0].accumulator is None:
                for state, accumulator in zip(self._trained, self._new_accumulators()):
                    state.accumulator = accumulator
                if not self.shares_memory:
                    self._watch_gradients()
        yield

    def _new_accumulators(self) -> list[torch.Tensor]:
        if not self.shares_memory:
            return [torch.zeros_like(state.weight.data, dtype=torch.float32) for state in self._trained]
        shapes = [torch.empty_like(state.weight.data, dtype=torch.float32, device="meta") for state in self._trained]
        size = aligned_bytes(shapes)
        memory = shared_bytes(self._world, self._world.world_size * size)
        if memory is None:
            raise_on_all("no memory to share for the sums of micro-batches; leave out --micro-batch-size")
        return tensors_in(memory, shapes, self._world.rank * size)

    def _keep_gradient(self, number: int, parameter: torch.Tensor) -> None:
        """Move a gradient that autograd has just made to where it is added up or shared."""
        gradient, state = parameter.grad, self._trained[number]
        assert gradient is not None
        if self._accumulates:
            assert state.accumulator is not None
            state.accumulator += gradient
            parameter.grad = None
        elif self.shares_memory and gradient is not self._places[number]:
            parameter.grad = self._places[number].copy_(gradient)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """Return the global norm of the averaged gradients, fp32, the same on every rank; `step` then clips them."""
        gradients = [state.accumulator if self._accumulates else state.weight.grad for state in self._trained]
        self._gradients = [gradient.contiguous() for gradient in gradients if gradient is not None]
        if self._world.world_size > 1 and not self.shares_memory:
            average_gradients(self._gradients, self._world)
        size, stride = self._gradients[0].element_size(), aligned_bytes(self._gradients)
        self._parameters["grad"] = [
            gradient.data_ptr() - self._group.rank * stride + start * size
            for gradient, start in zip(self._gradients, self._starts)
        ]
        is_fp32 = self._gradients[0].dtype == torch.float32
        self._located = np.array((stride, self._group.world_size, is_fp32), GRADIENTS)
        barrier_sum(self._group)  # the gradients of all are there
        square_sum = barrier_sum(self._group, self._kernels.square_sum(self._parameters, self._located))
        norm = torch.tensor(math.sqrt(square_sum))
        if self._world.world_size > self._world.local_world_size:
            dist.broadcast(norm, 0)  # nodes with other numbers of cores add it up in another order
        self._norm, self._max_norm = norm, max_norm
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one step with the gradients that `clip_grad_norm` has seen; `lr` is before layer-wise decay."""
        self._steps += 1
        scale = float((self._max_norm / (self._norm + 1e-6)).clamp(max=1.0)) if self._max_norm else 1.0
        bias_correction = 1 - BETAS[0] ** self._steps
        self._parameters["rate"] = [lr * state.lr_scale / bias_correction for state in self._trained]
        self._parameters["decay"] = [lr * state.lr_scale * state.weight_decay for state in self._trained]
        inverse_bias_correction = 1 / math.sqrt(1 - BETAS[1] ** self._steps)
        self._kernels.adamw(self._parameters, self._located, scale, *BETAS, EPSILON, inverse_bias_correction)
        barrier_sum(self._group)  # all parts are updated

    def zero_grad(self) -> None:
        """Forget the gradients, also those that were added up."""
        self._gradients = []
        self._accumulates = False
        for state in self._trained:
            state.weight.grad = None
            if state.accumulator is not None:
                state.accumulator.zero_()

    def weights(self) -> dict[str, LazyTensor]:
        """Return the fp32 weights by the parameters' names, to be written."""
        return {state.name: state.master() for state in self._states}

    def moments(self) -> dict[str, torch.Tensor]:
        """Return the moments of what is trained, fp32, `exp_avg.NAME` and `exp_avg_sq.NAME`."""
        moments = {}
        for state in self._trained:
            assert state.exp_avg is not None
            assert state.exp_avg_sq is not None
            moments[f"exp_avg.{state.name}"], moments[f"exp_avg_sq.{state.name}"] = state.exp_avg, state.exp_avg_sq
        return moments

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor], steps: int) -> None:
        """Load what `weights()` and `moments()` returned after `steps` steps; every rank must call it."""
        self._steps = steps
        for state in self._states:
            if self._world.rank == 0 or not (self.shares_memory and state.weight.requires_grad):
                state.load(weights[state.name])
        if self._world.rank == 0 or not self.shares_memory:
            for name, tensor in self.moments().items():
                tensor.copy_(moments[name])
        barrier_sum(self._group)  # rank 0 has copied everything
