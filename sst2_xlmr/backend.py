"""What computes: an engine where one applies, else plain PyTorch. The only module that knows `engines/`.

Without that folder everything is computed by plain PyTorch, more slowly.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

from sst2_xlmr.config import Config
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.task import Task
from sst2_xlmr.training.ddp import wrap_ddp
from sst2_xlmr.training.optimizer import AdamW, Optimizer
from sst2_xlmr.util.distributed import World

engines: Any = None
if importlib.util.find_spec("sst2_xlmr.engines"):
    engines = importlib.import_module("sst2_xlmr.engines")


def training_backend(
    classifier: SequenceClassifier, config: Config, precision: str, world: World
) -> tuple[nn.Module, nn.Module, Optimizer, str]:
    """Choose what trains a classifier; every rank must call it, with the same weights.

    Args:
        classifier: in fp32, on the world's device.
        precision: bf16, fp32 or tf32.

    Returns:
        What gives logits; the same or under DDP, to be trained; its optimizer; and why it is plain PyTorch, or "".
    """
    reason = "as asked" if not config.compile else "there is no engines/" if engines is None else ""
    if not reason and (engine := engines.training(classifier, config, precision, world)):
        model, optimizer = engine
        return model, model, optimizer, ""
    classifier.autocast = precision == "bf16"
    plain = AdamW(classifier, classifier.shape.layers, config, world)
    return classifier, wrap_ddp(classifier, world), plain, reason or engines.fallback_reason(world)


def prediction_model(classifier: SequenceClassifier) -> nn.Module:
    """Return what computes a classifier's logits fastest where it is."""
    faster: nn.Module | None = engines and engines.predicting(classifier)
    return faster or classifier


def quantized_model(classifier: SequenceClassifier, task: Task, dtype: torch.dtype) -> nn.Module | None:
    """Return the forward pass in 8-bit integers of an fp32 classifier on the CPU, which is not needed any more.

    What is not a product with weights has that dtype. None if this machine cannot.
    """
    quantized: nn.Module | None = engines and engines.quantized(classifier, task, dtype)
    return quantized
