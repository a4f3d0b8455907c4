"""XLM-R text -> ids, with torchtext's SentencePiece; scriptable, so that a saved model can take raw strings."""

from __future__ import annotations

from pathlib import Path
from typing import List, Optional  # noqa: UP035 (TorchScript knows List only)

import torch
from torchtext.transforms import SentencePieceTokenizer

from sst2_xlmr.errors import UserError

PAD_ID = 1


class Tokenizer(torch.nn.Module):
    """Turn texts into XLM-R's ids: `<s> a </s>`, or of a pair `<s> a </s></s> b </s>`.

    XLM-R's numbering is fairseq's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, and every other piece its SentencePiece
    id + 1 (SentencePiece's own 0 is `<unk>`). Asking SentencePiece for ids directly needs neither the string pieces
    nor torchtext's separate vocabulary file.
    """

    def __init__(self, model_file: str, max_length: int) -> None:
        super().__init__()
        self.pieces = SentencePieceTokenizer(model_file).sp_model
        self.max_length = max_length
        self.vocab_size: int = self.pieces.GetPieceSize() + 1  # every id is below it

    def forward(self, texts: List[str], pairs: Optional[List[str]] = None) -> List[List[int]]:  # noqa: UP006, UP045
        """Return ids per row, at most `max_length` each; a text that is cut keeps its `</s>`.

        A pair that is too long loses tokens at the end of the longer text, one at a time, and of the second where both
        are equally long: `longest_first` of transformers' `XLMRobertaTokenizer`.

        Args:
            texts: one per row.
            pairs: the second text of every row; None if rows have one.
        """
        result: List[List[int]] = []  # noqa: UP006
        for row, text in enumerate(texts):
            ids = [0]
            first = self.pieces.EncodeAsIds(text)
            room = self.max_length - 2
            if pairs is None:
                self._append(ids, first, room)
            else:
                second = self.pieces.EncodeAsIds(pairs[row])
                room -= 2
                kept = min(len(first), max(room - len(second), (room + 1) // 2))
                self._append(ids, first, kept)
                ids.append(2)
                self._append(ids, second, room - kept)
            result.append(ids)
        return result

    def _append(self, ids: List[int], pieces: List[int], count: int) -> None:  # noqa: UP006
        """Append the first `count` pieces and a `</s>`."""
        for piece in pieces[:count]:
            ids.append(3 if piece == 0 else piece + 1)
        ids.append(2)

    def is_longer(self, text: str, pair: Optional[str] = None) -> bool:  # noqa: UP045
        """Whether `forward` cuts this row."""
        length = len(self.pieces.EncodeAsIds(text)) + 2
        if pair is not None:
            length += len(self.pieces.EncodeAsIds(pair)) + 2
        return length > self.max_length


def load_tokenizer(model_file: Path, max_length: int) -> Tokenizer:
    """Load a `sentencepiece.bpe.model`.

    Raises:
        UserError: if the file is missing or is no SentencePiece model.
    """
    if not model_file.is_file():
        raise UserError(
            f"{model_file} does not exist; an encoder's folder needs its SentencePiece model under that name"
        )
    try:
        return Tokenizer(str(model_file), max_length)
    except RuntimeError as error:
        raise UserError(
            f"{model_file} is not a SentencePiece model ({str(error).splitlines()[0]}); fetch it again"
        ) from None
