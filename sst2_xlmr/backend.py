"""Chooses an engine if one applies, else plain PyTorch; the only module that knows `engines/`, which may be missing."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sst2_xlmr.config import Config
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.task import Task
from sst2_xlmr.training.optimizer import AdamW
from sst2_xlmr.util.distributed import World

engines: Any = None
if (Path(__file__).parent / "engines/__init__.py").is_file():  # in this copy of the package
    engines = importlib.import_module("sst2_xlmr.engines")


def training_backend(
    classifier: SequenceClassifier, config: Config, precision: str, world: World
) -> tuple[nn.Module, nn.Module, AdamW, str]:
    """Return model, ddp_model, optimizer, and why they are plain PyTorch ("" for an engine); the classifier is fp32."""
    reason = "--no-compile" if not config.compile else ""
    if engines is None:
        reason = "engines/ is not installed"
    elif not reason:
        if engine := engines.training_engine(classifier, config, precision, world):
            model, optimizer = engine
            return model, model, optimizer, ""
        reason = engines.fallback_reason(world)
    classifier.autocast = precision == "bf16"
    plain = AdamW(classifier, classifier.shape.layers, config, world)
    return classifier, wrap_ddp(classifier, world), plain, reason


def wrap_ddp(model: nn.Module, world: World) -> nn.Module:
    """Wrap the model in DistributedDataParallel, unless there is only one process."""
    if world.world_size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else []
    # The one buffer, the id map, never changes.
    wrapped = DistributedDataParallel(model, devices or None, broadcast_buffers=False, gradient_as_bucket_view=True)
    # DDP rebuilds its buckets after the first backward pass, and with three or more processes the order of summation
    # depends on the buckets. So one backward pass is made here: otherwise, the first step after a resume would differ
    # in the last bit from the same step of an uninterrupted run.
    with torch.random.fork_rng(devices):
        wrapped(torch.zeros(2, dtype=torch.int64, device=world.device), torch.tensor([2])).float().sum().backward()
    wrapped.zero_grad(set_to_none=True)
    return wrapped


def prediction_model(classifier: SequenceClassifier) -> nn.Module:
    """Return the fastest module that computes the classifier's logits on its device."""
    return (engines and engines.prediction_engine(classifier)) or classifier


def quantized_model(classifier: SequenceClassifier, task: Task, dtype: torch.dtype) -> nn.Module | None:
    """Return an fp32 classifier, on the CPU, with int8 weights and the rest in `dtype`; None if no engine can do it."""
    return engines and engines.int8_engine(classifier, task, dtype)
