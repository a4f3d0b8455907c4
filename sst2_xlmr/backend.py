"""The only module that knows `engines/`. Without that folder everything is computed the plain way, more slowly."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sst2_xlmr.model.classifier import Classifier, load_classifier
from sst2_xlmr.model.tokenizer import Tokenizer
from sst2_xlmr.training.ddp import Computation
from sst2_xlmr.training.optimizer import AdamW
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.memory import give_back_memory


def accelerate(
    classifier: Classifier, world: World, optimizer: AdamW | None = None, compiles: bool = True
) -> Computation:
    """Return how to compute a classifier: by an engine if one applies, else the plain way.

    Every rank must call this, all with the same weights.

    Args:
        optimizer: of these parameters, in training; the engines may take over its steps too.
        compiles: whether the engines may be used at all.
    """
    if not compiles or not _has_engines():
        return Computation(classifier, why_not_compiled="there is no engines/" if compiles else "as asked")
    from sst2_xlmr import engines

    return engines.accelerate(classifier, world, optimizer)


def _has_engines() -> bool:
    return Path(__file__).with_name("engines").is_dir()


def quantized(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Tokenizer, list[str]] | None:
    """Load a trained model's folder for prediction in 8 bits on the CPU; see `load_classifier`.

    Args:
        dtype: of what is not computed in 8 bits.

    Returns:
        None if this machine cannot.
    """
    if not _has_engines():
        return None
    from sst2_xlmr import engines

    if not engines.can_quantize():
        return None
    classifier, tokenizer, label_names = load_classifier(folder, torch.device("cpu"), bf16=False)
    module = engines.quantize(classifier, dtype)
    del classifier
    give_back_memory()
    return module, tokenizer, label_names
