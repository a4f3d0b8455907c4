"""The only module that knows `engines/`. Without that folder everything is computed the plain way, more slowly."""

from __future__ import annotations

from pathlib import Path

from sst2_xlmr.distributed import World
from sst2_xlmr.model.classifier import Classifier
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
    if not compiles or not Path(__file__).with_name("engines").is_dir():
        return Computation(classifier)
    from sst2_xlmr import engines

    return engines.accelerate(classifier, world, optimizer)
