"""An encoder's weights under our names, and whether they fit its configuration."""

from __future__ import annotations

from pathlib import Path

import torch

from sst2_xlmr.model.encoders import BUNDLE_SHAPES, Encoder
from sst2_xlmr.model.vocabulary import EMBEDDING
from sst2_xlmr.model.weight_files import Weights, reading_errors
from sst2_xlmr.model.weight_names import EMBEDDING_SOURCES, Tensors, from_hugging_face, from_torchtext
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.tensors import LazyTensor


def load_tensors(encoder: Encoder, ids: torch.Tensor | None = None) -> Tensors:
    """Read an encoder's weights; returns fp32 tensors under our names, with `head.*` where it has a head.

    UserError if the file cannot be read as weights, or its table does not have the configured number of rows.

    Args:
        ids: int64 [rows], the rows of the embedding table to read; None for all.
    """
    with reading_errors(encoder.weights_file):
        raw = Weights(encoder.weights_file, ids, encoder.shape.layers)
        if ids is not None:
            _find_table(encoder, raw)
        if encoder.name in BUNDLE_SHAPES:
            return from_torchtext(list(raw.raw), raw.tensor)
        return from_hugging_face(list(raw.raw), raw.tensor, encoder.is_bert)


def pretrained_table(encoder: Encoder) -> LazyTensor:
    """Return the encoder's embedding table, fp32 [vocab_size, hidden], read a few rows at a time.

    UserError if the file cannot be read as weights, or has no such table.
    """
    file = encoder.weights_file
    with reading_errors(file):
        raw = Weights(file, None, encoder.shape.layers)
        name = _find_table(encoder, raw)

    def rows(start: int, stop: int) -> torch.Tensor:
        with reading_errors(file):
            return raw.read(name, slice(start, stop))

    return LazyTensor((encoder.shape.vocab_size, encoder.shape.hidden), torch.float32, rows)


def _find_table(encoder: Encoder, raw: Weights) -> str:
    """Return the embedding table's name in the file, and check its shape."""
    name = next((name for name in EMBEDDING_SOURCES if name in raw.raw), "")
    expected = torch.Size((encoder.shape.vocab_size, encoder.shape.hidden))
    check_fit({EMBEDDING: raw.raw[name]} if name else {}, {EMBEDDING: expected}, encoder.weights_file)
    return name


def check_fit(tensors: Tensors, expected: dict[str, torch.Size], file: Path) -> None:
    """Raise UserError, naming the first, if tensors are missing, superfluous or of another shape than configured."""
    problems = []
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"{name} {list(shape)} is missing")
        elif tensors[name].shape != shape:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
    superfluous = [name for name in tensors if name.startswith("encoder.") and name not in expected]
    problems += [f"{name} is not in the configured model" for name in superfluous]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{file} does not fit its configuration: {problems[0]}{more}; check config.json beside it")
