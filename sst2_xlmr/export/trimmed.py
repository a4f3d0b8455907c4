"""A model without the embedding rows that some texts do not need: most of XLM-R's parameters are such rows.

The pieces that the texts are made of stay, and every single character, so that no character becomes unknown. A
SentencePiece model of XLM-R's kind (unigram) cuts a text into the most probable pieces, so the texts are cut as before
when only pieces are left out that no best cut has. Other texts are cut into more and shorter pieces, which the model
knows less well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor

from sst2_xlmr.export.folder import read_card, with_note, write_folder
from sst2_xlmr.export.tokenizer_json import UNIGRAM, model_class
from sst2_xlmr.model.encoders import Encoder
from sst2_xlmr.model.vocabulary import SPECIAL_IDS, TABLE
from sst2_xlmr.model.weights import load_tensors
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import scratch_name

_CONTROLS = 3  # <unk>, <s>, </s> are SentencePiece's first
_SPACE = "▁"


def needed_pieces(pieces: SentencePieceProcessor, texts: Iterable[str]) -> np.ndarray:
    """Return int64, ascending: the SentencePiece ids that stay."""
    names = [pieces.IdToPiece(number) for number in range(pieces.GetPieceSize())]
    is_needed = np.zeros(len(names), bool)
    is_needed[:_CONTROLS] = True
    characters = [set(name) - {_SPACE} for name in names]
    alone = {name.lstrip(_SPACE) for name in names if len(name.lstrip(_SPACE)) == 1}
    for number, (name, of_piece) in enumerate(zip(names, characters)):
        # Characters that only occur inside longer pieces stay with all of these.
        is_needed[number] |= len(name.lstrip(_SPACE)) <= 1 or not of_piece <= alone
    for text in texts:
        is_needed[pieces.EncodeAsIds(text)] = True
    return np.flatnonzero(is_needed)


def trimmed_tokenizer(model_file: Path, kept: np.ndarray) -> bytes:
    """Return the SentencePiece model with some of its pieces; kept: int, ascending, their ids."""
    model = model_class().FromString(model_file.read_bytes())
    if model.trainer_spec.model_type != UNIGRAM:
        raise UserError(f"{model_file} is no unigram model, so its pieces depend on one another; it cannot be trimmed")
    pieces = [model.pieces[number] for number in kept.tolist()]
    del model.pieces[:]
    model.pieces.extend(pieces)
    return bytes(model.SerializeToString())


def write_trimmed(encoder: Encoder, texts: Iterable[str], folder: Path) -> int:
    """Write a trained model's folder without what the texts do not need; returns how many embedding rows are left."""
    pieces = SentencePieceProcessor(model_file=str(encoder.tokenizer_file))
    kept = needed_pieces(pieces, texts)
    # XLM-R's ids: four of its own, then every piece's + 1 (see model.tokenizer), then <mask>.
    rest = np.arange(pieces.GetPieceSize() + 1, encoder.shape.vocab_size)
    rows = np.concatenate([np.arange(SPECIAL_IDS), kept[_CONTROLS:] + 1, rest])
    weights = load_tensors(encoder)
    weights[TABLE] = weights[TABLE][torch.from_numpy(rows)]
    tokenizer_file = scratch_name(folder)
    tokenizer_file.write_bytes(trimmed_tokenizer(encoder.tokenizer_file, kept))
    trimmed = replace(encoder, shape=replace(encoder.shape, vocab_size=len(rows)), tokenizer_file=tokenizer_file)
    note = f"The vocabulary is trimmed: {len(rows):,} of {encoder.shape.vocab_size:,} pieces are left."
    write_folder(folder, weights, trimmed, with_note(read_card(encoder.weights_file.parent), note))
    tokenizer_file.unlink()
    return len(rows)
