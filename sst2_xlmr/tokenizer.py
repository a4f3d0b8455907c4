"""XLM-R text -> ids, with torchtext's SentencePiece; scriptable, so that a saved model can take raw strings."""

from __future__ import annotations

from pathlib import Path
from typing import List  # noqa: UP035 (TorchScript knows List only)

import torch
from torchtext.transforms import SentencePieceTokenizer

from sst2_xlmr.config import UserError

PAD_ID = 1


class Tokenizer(torch.nn.Module):
    """Turn texts into XLM-R's ids: `<s>`, pieces, `</s>`.

    XLM-R's numbering is fairseq's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, and every other piece its SentencePiece
    id + 1 (SentencePiece's own 0 is `<unk>`). Asking SentencePiece for ids directly needs neither the string pieces
    nor torchtext's separate vocabulary file.
    """

    def __init__(self, model_file: str, max_length: int) -> None:
        super().__init__()
        self.pieces = SentencePieceTokenizer(model_file).sp_model
        self.max_length = max_length
        self.vocab_size: int = self.pieces.GetPieceSize() + 1  # every id is below it

    def forward(self, texts: List[str]) -> List[List[int]]:  # noqa: UP006
        """Return ids per text, at most `max_length` each; a text that is cut keeps its `</s>`."""
        result: List[List[int]] = []  # noqa: UP006
        for text in texts:
            ids = [0]
            for piece in self.pieces.EncodeAsIds(text)[: self.max_length - 2]:
                ids.append(3 if piece == 0 else piece + 1)
            ids.append(2)
            result.append(ids)
        return result

    def is_longer(self, text: str) -> bool:
        """Whether `forward` cuts this text."""
        return len(self.pieces.EncodeAsIds(text)) + 2 > self.max_length


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
