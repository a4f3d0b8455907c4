"""What computes: an engine where one applies, else plain PyTorch. The only module that knows `engines/`.

Without that folder everything is computed by plain PyTorch, more slowly.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sst2_xlmr.config import Config
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.task import Task
from sst2_xlmr.training.ddp import wrap_ddp
from sst2_xlmr.training.optimizer import AdamW, Optimizer
from sst2_xlmr.util.distributed import World

engines: Any = None
if Path(__file__).with_name("engines").is_dir():  # of this copy: a finder may know another one's
    engines = importlib.import_module("sst2_xlmr.engines")


class Backend(NamedTuple):
    """What computes a run.

    Attributes:
        forward: gives logits, for evaluation.
        model: what is trained, perhaps under DDP.
        optimizer: torch's, or an engine's with the same methods.
        fallback_reason: why it is plain PyTorch; empty if an engine computes.
    """

    forward: nn.Module
    model: nn.Module
    optimizer: Optimizer
    fallback_reason: str


def training_backend(classifier: SequenceClassifier, config: Config, precision: str, world: World) -> Backend:
    """Return what trains a classifier on the world's device; every rank must call it, with the same weights.

    Args:
        classifier: in fp32, on that device.
        precision: bf16, fp32 or tf32.
    """
    reason = "as asked" if not config.compile else "there is no engines/" if engines is None else ""
    if not reason and (engine := engines.training(classifier, config, precision, world)):
        model, optimizer = engine
        return Backend(model, model, optimizer, "")
    classifier.autocast = precision == "bf16"
    plain = AdamW(classifier, classifier.shape.layers, config, world)
    return Backend(classifier, wrap_ddp(classifier, world), plain, reason or engines.fallback_reason(world))


def prediction_model(classifier: SequenceClassifier) -> nn.Module:
    """Return what computes a classifier's logits fastest where it is."""
    faster: nn.Module | None = engines and engines.predicting(classifier)
    return faster or classifier


def quantized_model(classifier: SequenceClassifier, task: Task, dtype: torch.dtype) -> nn.Module | None:
    """Return a classifier's forward pass in 8-bit integers; None if this machine cannot.

    Args:
        classifier: in fp32, on the CPU; it is not needed any more.
        dtype: of what is not computed in 8 bits.
    """
    quantized: nn.Module | None = engines and engines.quantized(classifier, task, dtype)
    return quantized
