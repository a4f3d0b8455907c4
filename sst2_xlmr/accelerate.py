"""The only module that knows `engines/`. Without that folder everything is computed the plain way, more slowly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from sst2_xlmr.distributed import World
from sst2_xlmr.errors import UserError
from sst2_xlmr.memory import give_back_memory
from sst2_xlmr.model.classifier import Classifier, load_classifier
from sst2_xlmr.model.tokenizer import Tokenizer
from sst2_xlmr.numerics import choose_precision
from sst2_xlmr.training.averaging import Computation
from sst2_xlmr.training.optimizer import AdamW


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
        return Computation(classifier)
    from sst2_xlmr import engines

    return engines.accelerate(classifier, world, optimizer)


def _has_engines() -> bool:
    return Path(__file__).with_name("engines").is_dir()


class Model(NamedTuple):
    """A trained model, ready for prediction.

    Attributes:
        module: gives logits.
        precision: in which it computes: int8, bf16 or fp32.
    """

    module: nn.Module
    tokenizer: Tokenizer
    label_names: list[str]
    precision: str


def load_model(folder: Path, device: torch.device, precision: str) -> Model:
    """Load a trained model's folder.

    Args:
        precision: auto, bf16, fp32 or int8. If this machine cannot compute int8 faster, one line on standard error says
            so, and it is auto.

    Raises:
        UserError: for int8 on CUDA, or if the folder is not a model's.
    """
    if precision == "int8" and device.type != "cpu":
        raise UserError("--precision int8 is for a CPU; take bf16 or fp32, or --device cpu")
    plain = choose_precision("auto" if precision == "int8" else precision, device)
    if precision == "int8" and _has_engines():
        from sst2_xlmr import engines

        if engines.can_quantize():
            classifier, tokenizer, label_names = load_classifier(folder, device, bf16=False)
            dtype = torch.bfloat16 if plain == "bf16" else torch.float32
            quantized = engines.quantize(classifier, dtype)
            del classifier
            give_back_memory()
            return Model(quantized, tokenizer, label_names, precision)
    if precision == "int8":
        lacks = "int8 needs a CPU with AVX512-VNNI, Linux and a C compiler"
        print(f"warning: {lacks}: computing in {plain} instead", file=sys.stderr)
    classifier, tokenizer, label_names = load_classifier(folder, device, plain == "bf16")
    return Model(accelerate(classifier, World.alone(device)).model, tokenizer, label_names, plain)
