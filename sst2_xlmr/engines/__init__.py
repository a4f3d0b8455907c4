"""Faster ways to compute the same; everything works without this folder (see `sst2_xlmr.backend`).

An engine replaces one of three things: the forward pass over the classifier's parameters (in prediction also by one in
8-bit integers), the optimizer's norm and update, the averaging of gradients. Nothing in `model/` and `training/` knows
of it.
"""

from __future__ import annotations

from functools import partial

import torch

from sst2_xlmr.engines.cpu.adamw import CpuEngine, share_memory
from sst2_xlmr.engines.cpu.exchange import exchange_gradients
from sst2_xlmr.engines.cpu.int8 import Int8Classifier
from sst2_xlmr.engines.cpu.kernels import fallback_reason, load_kernels
from sst2_xlmr.engines.cpu.packed_encoder import PackedClassifier
from sst2_xlmr.engines.cuda.adamw import compiled_engine, why_not_compiled
from sst2_xlmr.model.classifier import Classifier
from sst2_xlmr.training.ddp import Computation
from sst2_xlmr.training.optimizer import AdamW
from sst2_xlmr.util.distributed import World, gather_objects


def accelerate(classifier: Classifier, world: World, optimizer: AdamW | None) -> Computation:
    """Replace what can be computed faster on this device; nothing, if it cannot on any rank.

    On a CPU that needs GCC, on CUDA Triton. Every rank must call this, all with the same weights.

    Args:
        optimizer: gets another engine; None for prediction.
    """
    if world.device.type == "cuda":
        return _accelerate_on_cuda(classifier, world, optimizer)
    dtype = next(classifier.parameters()).dtype
    reasons = [reason for reason in gather_objects(world, fallback_reason(dtype)) if reason]
    kernels = load_kernels(dtype)
    if reasons or kernels is None:
        return Computation(classifier, why_not_compiled=reasons[0])
    model = PackedClassifier(classifier, kernels)
    if optimizer is not None:
        shares_memory = world.world_size > 1 and share_memory(optimizer.trained, world)
        team = world if shares_memory else World.alone(world.device)
        optimizer.engine = CpuEngine(kernels, optimizer.trained, team)
    return Computation(model, partial(exchange_gradients, world, kernels))


def _accelerate_on_cuda(classifier: Classifier, world: World, optimizer: AdamW | None) -> Computation:
    if optimizer is None:
        return Computation(classifier)
    reasons = [
        reason for reason in gather_objects(world, why_not_compiled(world.device, optimizer.has_masters)) if reason
    ]
    if not reasons:
        optimizer.engine = compiled_engine(optimizer.trained)
    return Computation(classifier, why_not_compiled="".join(reasons[:1]))


def can_quantize() -> bool:
    """Whether `quantize` works: that takes GCC and AVX512-VNNI."""
    kernels = load_kernels(torch.float32)
    return kernels is not None and kernels.has_int8


def quantize(classifier: Classifier, dtype: torch.dtype) -> Int8Classifier:
    """Return a classifier's forward pass in 8-bit integers.

    Args:
        classifier: in fp32, on the CPU; it is not needed any more.
        dtype: of what is not a product with weights.
    """
    kernels, fp32 = load_kernels(dtype), load_kernels(torch.float32)
    assert kernels is not None and fp32 is not None
    return Int8Classifier(classifier, kernels, fp32)
