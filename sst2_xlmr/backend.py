"""What computes: an engine where one applies, else plain PyTorch. The only module that knows `engines/`.

Without that folder everything is computed by plain PyTorch, more slowly.
"""

from __future__ import annotations

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
if (Path(__file__).parent / "engines/__init__.py").is_file():  # of this copy: a finder may know another one's
    engines = importlib.import_module("sst2_xlmr.engines")


def training_backend(
    classifier: SequenceClassifier, config: Config, precision: str, world: World
) -> tuple[nn.Module, nn.Module, AdamW, str]:
    """Choose what trains a classifier, which is fp32 on the world's device, with the same weights on every rank.

    Returns what gives logits, the same or under DDP, to be trained, the optimizer, which may be an engine's, and why
    all are plain PyTorch, or "".
    """
    reason = "as asked" if not config.compile else ""
    if engines is None:
        reason = "there is no engines/"
    elif not reason:
        if engine := engines.training(classifier, config, precision, world):
            model, optimizer = engine
            return model, model, optimizer, ""
        reason = engines.fallback_reason(world)
    classifier.autocast = precision == "bf16"
    plain = AdamW(classifier, classifier.shape.layers, config, world)
    return classifier, wrap_ddp(classifier, world), plain, reason


def wrap_ddp(model: nn.Module, world: World) -> nn.Module:
    """Return the model under DistributedDataParallel; the model itself with one process.

    DDP rebuilds its buckets after the first backward pass. With three or more processes the order of summation depends
    on them, so that the first step after a resume would differ in the last bit from the same step of a run that was not
    interrupted: there is one backward pass in advance.
    """
    if world.world_size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else []
    # The one buffer, the id map, never changes.
    wrapped = DistributedDataParallel(model, devices or None, broadcast_buffers=False, gradient_as_bucket_view=True)
    with torch.random.fork_rng(devices):
        wrapped(torch.zeros(2, dtype=torch.int64, device=world.device), torch.tensor([2])).float().sum().backward()
    wrapped.zero_grad(set_to_none=True)
    return wrapped


def prediction_model(classifier: SequenceClassifier) -> nn.Module:
    """Return what computes a classifier's logits fastest where it is."""
    return (engines and engines.predicting(classifier)) or classifier


def quantized_model(classifier: SequenceClassifier, task: Task, dtype: torch.dtype) -> nn.Module | None:
    """Return an fp32 classifier in 8-bit integers, all but its products with weights in `dtype`; None if it cannot be.

    The classifier, on the CPU, is not needed any more.
    """
    return engines and engines.quantized(classifier, task, dtype)
