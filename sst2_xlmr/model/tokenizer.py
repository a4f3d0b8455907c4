"""XLM-R text -> ids, with SentencePiece."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import List, Optional  # noqa: UP035 (TorchScript knows these only)

import numpy as np
from sentencepiece import SentencePieceProcessor

from sst2_xlmr.util.errors import UserError


def add_special_tokens(first: List[int], second: Optional[List[int]], max_length: int) -> List[int]:  # noqa: UP006, UP045
    """Return a row's SentencePiece ids, at most `max_length`: `<s> a </s>`, or of a pair `<s> a </s></s> b </s>`.

    A text that is cut keeps its `</s>`. A pair that is too long loses tokens at the end of the longer text, one at a
    time, and of the second where both are equally long: `longest_first` of transformers 4's `XLMRobertaTokenizer`.
    `<s>` is -1 and `</s>` 1, which become XLM-R's numbers as every other piece does (see `Tokenizer`). TorchScript can
    compile this, for the export.
    """
    begin, end, room = [-1], [1], max_length - 2
    if second is None:
        return begin + first[:room] + end
    room -= 2
    kept = min(len(first), max(room - len(second), (room + 1) // 2))
    return begin + first[:kept] + end + end + second[: room - kept] + end


class Tokenizer:
    """Turns texts into XLM-R's ids; several threads may use it at once.

    XLM-R's numbering is fairseq's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, and every other piece its SentencePiece
    id + 1 (SentencePiece's own 0 is `<unk>`). So neither the string pieces nor torchtext's separate vocabulary file are
    needed.
    """

    def __init__(self, pieces: SentencePieceProcessor, model_file: Path, max_length: int) -> None:
        self.model_file, self.max_length = model_file, max_length
        self._pieces = pieces
        self.vocab_size: int = pieces.GetPieceSize() + 1  # every id is below it

    def flat_ids(self, texts: list[str], pairs: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all rows one after another, int32 [tokens], and tokens per row, int64 [rows].

        Args:
            pairs: the second text of every row; None if rows have one.
        """
        seconds = [None] * len(texts) if pairs is None else self._pieces.Encode(pairs)
        rows = [add_special_tokens(*both, self.max_length) for both in zip(self._pieces.Encode(texts), seconds)]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum()))
        ids += 1
        ids[ids == 1] = 3  # <unk>
        return ids, lengths

    def pieces_of(self, ids: list[int]) -> list[str]:
        """Return the pieces that ids stand for; `<s>`, `</s>` and `<unk>` are the same for all tokenizers."""
        return [str(number) if number < 4 else self._pieces.IdToPiece(number - 1) for number in ids]

    def is_longer(self, text: str, pair: str | None = None) -> bool:
        """Whether this row is cut."""
        return sum(len(self._pieces.Encode(part)) + 2 for part in (text, pair) if part is not None) > self.max_length


def load_tokenizer(model_file: Path, max_length: int) -> Tokenizer:
    """Load a `sentencepiece.bpe.model`; UserError if the file is missing or is no SentencePiece model."""
    if not model_file.is_file():
        cure = "an encoder's folder needs its SentencePiece model under that name"
        raise UserError(f"{model_file} does not exist; {cure}")
    try:
        return Tokenizer(SentencePieceProcessor(model_file=str(model_file), num_threads=1), model_file, max_length)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{model_file} is not a SentencePiece model ({reason}); fetch it again") from None
