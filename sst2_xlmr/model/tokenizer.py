"""XLM-R text -> ids, with SentencePiece."""

from __future__ import annotations

from pathlib import Path
from typing import List, Optional  # noqa: UP035 (TorchScript knows these only)

from sentencepiece import SentencePieceProcessor

from sst2_xlmr.errors import UserError


def append_pieces(ids: List[int], pieces: List[int], count: int) -> None:  # noqa: UP006
    """Append the first `count` SentencePiece ids, as XLM-R numbers them, and a `</s>`.

    XLM-R's numbering is fairseq's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, and every other piece its SentencePiece
    id + 1 (SentencePiece's own 0 is `<unk>`). So neither the string pieces nor torchtext's separate vocabulary file are
    needed.
    """
    for piece in pieces[:count]:
        ids.append(3 if piece == 0 else piece + 1)
    ids.append(2)


def row_ids(first: List[int], second: Optional[List[int]], max_length: int) -> List[int]:  # noqa: UP006, UP045
    """Return XLM-R's ids of a row, at most `max_length`: `<s> a </s>`, or of a pair `<s> a </s></s> b </s>`.

    A text that is cut keeps its `</s>`. A pair that is too long loses tokens at the end of the longer text, one at a
    time, and of the second where both are equally long: `longest_first` of transformers 4's `XLMRobertaTokenizer`.
    TorchScript can compile this and `append_pieces`, for the export.

    Args:
        first, second: SentencePiece ids of the texts; None if the row has no second.
    """
    ids = [0]
    room = max_length - 2
    if second is None:
        append_pieces(ids, first, room)
    else:
        room -= 2
        kept = min(len(first), max(room - len(second), (room + 1) // 2))
        append_pieces(ids, first, kept)
        ids.append(2)
        append_pieces(ids, second, room - kept)
    return ids


class Tokenizer:
    """Turns texts into XLM-R's ids; several threads may use it at once."""

    def __init__(self, pieces: SentencePieceProcessor, model_file: Path, max_length: int) -> None:
        self.model_file, self.max_length = model_file, max_length
        self._pieces = pieces
        self.vocab_size: int = pieces.GetPieceSize() + 1  # every id is below it

    def __call__(self, texts: list[str], pairs: list[str] | None = None) -> list[list[int]]:
        """Return ids per row (see `row_ids`).

        Args:
            texts: one per row.
            pairs: the second text of every row; None if rows have one.
        """
        seconds = [None] * len(texts) if pairs is None else self._pieces.Encode(pairs)
        return [row_ids(*both, self.max_length) for both in zip(self._pieces.Encode(texts), seconds)]

    def pieces_of(self, ids: list[int]) -> list[str]:
        """Return the pieces that ids stand for; `<s>`, `</s>` and `<unk>` are the same for all tokenizers."""
        return [str(number) if number < 4 else self._pieces.IdToPiece(number - 1) for number in ids]

    def is_longer(self, text: str, pair: str | None = None) -> bool:
        """Whether this row is cut."""
        return sum(len(self._pieces.Encode(part)) + 2 for part in (text, pair) if part is not None) > self.max_length


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
        return Tokenizer(SentencePieceProcessor(model_file=str(model_file), num_threads=1), model_file, max_length)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{model_file} is not a SentencePiece model ({str(error).splitlines()[0]}); fetch it again"
        ) from None
