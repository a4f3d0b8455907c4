"""A model with only the embedding rows that given texts need; the rows are most of XLM-R's parameters.

It keeps the pieces of these texts, and every single character, so that no character becomes unknown. A unigram
SentencePiece model such as XLM-R's splits a text into its most probable pieces, so these texts are split as before.
Other texts become more and shorter pieces, which the model understands less well.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sst2_xlmr.export.folder import read_card, with_note, write_folder
from sst2_xlmr.model.classifier import load_tensors
from sst2_xlmr.model.encoders import TOKENIZER_NAME, EncoderFolder
from sst2_xlmr.model.tokenizer import Tokenizer
from sst2_xlmr.model.tokenizer_files import SETTINGS_NAME, UNIGRAM, model_class
from sst2_xlmr.model.vocabulary import EMBEDDING, SPECIAL_IDS
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import scratch_folder

_CONTROLS = 3  # <unk>, <s>, </s> are SentencePiece's first
_SPACE = "▁"


def needed_pieces(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Return the SentencePiece ids to keep, int64, ascending."""
    pieces = tokenizer.pieces
    names = [pieces.IdToPiece(number).lstrip(_SPACE) for number in range(pieces.GetPieceSize())]
    is_needed = np.zeros(tokenizer.vocab_size, bool)
    is_needed[:_CONTROLS] = is_needed[[token.id - 1 for token in tokenizer.added]] = True
    alone = {name for name in names if len(name) == 1}
    for number, name in enumerate(names):
        # A character that is no piece itself keeps all longer pieces that contain it.
        is_needed[number] |= len(name) <= 1 or not {*name} - {_SPACE} <= alone
    for text in texts:
        is_needed[tokenizer.flat_ids([text])[0] - 1] = True
    return np.flatnonzero(is_needed[: len(names)])


def trimmed_tokenizer(model: bytes, kept: np.ndarray) -> bytes:
    """Return the SentencePiece model with only the pieces whose ids are in `kept`, int, ascending."""
    proto = model_class().FromString(model)
    if proto.trainer_spec.model_type != UNIGRAM:
        raise UserError("the tokenizer cannot be trimmed: it is no unigram model, so its pieces depend on one another")
    pieces = [proto.pieces[number] for number in kept.tolist()]
    del proto.pieces[:]
    proto.pieces.extend(pieces)
    return bytes(proto.SerializeToString())


def write_trimmed(encoder: EncoderFolder, texts: Iterable[str], folder: Path) -> int:
    """Write a model folder with only the embedding rows that the texts need; returns their number."""
    tokenizer = Tokenizer(encoder.tokenizer_file, sys.maxsize)
    kept = needed_pieces(tokenizer, texts)
    # XLM-R's ids: four of its own, then every piece's + 1 (see model.tokenizer), then <mask> and added ones.
    rest = np.arange(tokenizer.pieces.GetPieceSize() + 1, encoder.shape.vocab_size)
    rows = np.concatenate([np.arange(SPECIAL_IDS), kept[_CONTROLS:] + 1, rest])
    weights = load_tensors(encoder)
    weights[EMBEDDING] = weights[EMBEDDING][torch.from_numpy(rows)]
    added = {int(np.searchsorted(rows, token.id)): token._asdict() for token in tokenizer.added}
    with scratch_folder(folder) as scratch:
        file = scratch / TOKENIZER_NAME
        file.write_bytes(trimmed_tokenizer(tokenizer.pieces.serialized_model_proto(), kept))
        (scratch / SETTINGS_NAME).write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
        trimmed = replace(encoder, shape=replace(encoder.shape, vocab_size=len(rows)), tokenizer_file=file)
        note = f"The vocabulary is trimmed: {len(rows):,} of {encoder.shape.vocab_size:,} pieces are left."
        write_folder(folder, weights, trimmed, with_note(read_card(encoder.weights_file.parent), note))
    return len(rows)
