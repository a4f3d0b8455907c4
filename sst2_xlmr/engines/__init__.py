"""Faster implementations of the same computation; everything works without this folder (see backend.py).

An engine replaces the forward pass over the classifier's parameters (in prediction also by one in 8-bit integers), and
in training the optimizer, which then averages gradients over processes too. Nothing in `model/` and `training/` knows
of it.
"""

import torch
from torch import nn

from sst2_xlmr.config import Config
from sst2_xlmr.engines.cpu import kernels as cpu_kernels
from sst2_xlmr.engines.cpu.adamw import CpuAdamW
from sst2_xlmr.engines.cpu.int8 import Int8Classifier
from sst2_xlmr.engines.cpu.kernels import Kernels, load_kernels
from sst2_xlmr.engines.cpu.packed_encoder import PackedClassifier
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.task import Task
from sst2_xlmr.util.distributed import World, gather_objects


def kernels_for(dtype: torch.dtype, world: World) -> Kernels | None:
    """Return the CPU's kernels; None if the device is no CPU, or they do not compile on every rank."""
    kernels = load_kernels(dtype) if world.device.type == "cpu" else None
    return kernels if all(gather_objects(world, kernels is not None)) else None


def fallback_reason(world: World) -> str:
    """Return why there are no kernels on some rank; every rank must call it."""
    reason = cpu_kernels.fallback_reason() if world.device.type == "cpu" else "none for CUDA yet"
    return next(filter(None, gather_objects(world, reason)), "")


def prediction_engine(classifier: SequenceClassifier) -> nn.Module | None:
    """Return a faster model for prediction on the CPU; None if there is none."""
    parameter = next(classifier.parameters())
    kernels = kernels_for(parameter.dtype, World(parameter.device))
    return PackedClassifier(classifier, kernels) if kernels else None


def training_engine(
    classifier: SequenceClassifier, config: Config, precision: str, world: World
) -> tuple[nn.Module, CpuAdamW] | None:
    """Return a faster model and its optimizer; None if there is none. Every rank must call it, with the same weights.

    The classifier is in fp32, and its parameters become the optimizer's; the precision is bf16 or fp32.
    """
    kernels = kernels_for(torch.bfloat16 if precision == "bf16" else torch.float32, world)
    if kernels is None:
        return None
    model = PackedClassifier(classifier, kernels)
    optimizer = CpuAdamW(classifier, classifier.shape.layers, config, world, kernels)
    model.no_sync = optimizer.no_sync
    return model, optimizer


def int8_engine(classifier: SequenceClassifier, task: Task, dtype: torch.dtype) -> nn.Module | None:
    """Return a classifier's forward pass in 8-bit integers; None if this machine has no GCC or no AVX512-VNNI.

    The classifier, in fp32 on the CPU, is not needed afterwards; `dtype` is that of all but products with weights.
    """
    kernels, fp32 = load_kernels(dtype), load_kernels(torch.float32)
    if kernels is None or fp32 is None or not fp32.has_int8:
        return None
    return Int8Classifier(classifier, kernels, fp32, task)
