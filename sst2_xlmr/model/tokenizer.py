"""XLM-R text -> ids, with SentencePiece."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import List, NamedTuple, Optional  # noqa: UP035 (TorchScript knows these only)

import numpy as np
from sentencepiece import SentencePieceProcessor

from sst2_xlmr.model.tokenizer_files import added_tokens, sentencepiece_model
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import read_errors

BEGIN, END = 0, 2  # ids of <s> and </s>


class LongTexts(NamedTuple):
    """What becomes of a text beyond the longest input; see `Config.long_texts` and `Config.stride`."""

    kind: str = "cut"
    stride: int = 0


CUT = LongTexts()


def window_starts(ids: np.ndarray) -> np.ndarray:
    """Return bool [tokens], where a window of a text begins: at `<s>` after `</s>`; ids of rows one after another."""
    is_start = np.asarray(ids) == BEGIN
    is_start[1:] &= ids[:-1] == END
    return is_start


def add_special_tokens(
    first: List[int],  # noqa: UP006
    second: Optional[List[int]],  # noqa: UP006, UP045
    max_length: int,
    head_tail: bool = False,
) -> List[int]:  # noqa: UP006
    """Return a row's SentencePiece ids, at most `max_length`: `<s> a </s>`, or of a pair `<s> a </s></s> b </s>`.

    With `head_tail` a text that is too long also keeps its end, as three quarters of what is left (Sun et al. 2019,
    https://arxiv.org/abs/1905.05583, with 128 and 382 of 510 tokens). A pair that is too long loses tokens at the end
    of the longer text, or of the second where both are equally long: `longest_first` of transformers 4's
    `XLMRobertaTokenizer`. `<s>` is -1 and `</s>` 1, which become XLM-R's numbers as every other piece does (see
    `Tokenizer`). TorchScript compiles this, for the export.
    """
    begin, end, room = [-1], [1], max_length - 2
    if second is None:
        if head_tail and len(first) > room:
            return begin + first[: room // 4] + first[len(first) - (room - room // 4) :] + end
        return begin + first[:room] + end
    room -= 2
    kept = min(len(first), max(room - len(second), (room + 1) // 2))
    return begin + first[:kept] + end + end + second[: room - kept] + end


class Tokenizer:
    """Turns texts into XLM-R's ids; several threads may use it at once.

    XLM-R's numbering is fairseq's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, and every other piece its SentencePiece
    id + 1 (SentencePiece's own 0 is `<unk>`). A text that spells out one of these is text. Added tokens are found
    first, and SentencePiece cuts what is between them, as transformers does.

    Attributes:
        pieces: its SentencePiece model, which knows nothing of added tokens.
        vocab_size: every id is below it.
    """

    def __init__(self, file: Path, max_length: int, long_texts: LongTexts = CUT) -> None:
        """Load a SentencePiece model or a tokenizer.json, and what was added; UserError if it is not XLM-R's kind."""
        self.file, self.max_length, self.long_texts = file, max_length, long_texts
        with read_errors(f"{file} as a SentencePiece model", "fetch it again"):
            self.pieces = SentencePieceProcessor(model_proto=sentencepiece_model(file) or b"empty", num_threads=1)
        if [self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id()] != [0, 1, 2]:
            raise UserError(f"{file} is another family's tokenizer: XLM-R's begins with <unk>, <s> and </s>")
        self.added = added_tokens(file)
        self.vocab_size: int = max([self.pieces.GetPieceSize(), *(token.id for token in self.added)]) + 1
        longest_first = sorted(self.added, key=lambda token: -len(token.content))
        self._added_ids = [token.id - 1 for token in longest_first]
        patterns = []  # of one group each, the token
        for token in longest_first:
            pattern = f"({re.escape(token.content)})"
            pattern = rf"(?<!\w){pattern}(?!\w)" if token.single_word else pattern
            patterns.append(r"\s*" * token.lstrip + pattern + r"\s*" * token.rstrip)
        self._any_added = re.compile("|".join(patterns))

    def flat_ids(self, texts: list[str], pairs: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all rows one after another, int32 [tokens], and tokens per row, int64 [rows].

        A row's windows, each with its `<s>` and `</s>`, stand one after another. `pairs` has the second text of every
        row; None if rows have one text.
        """
        seconds = [None] * len(texts) if pairs is None else self._encode(pairs)
        rows = [self._row(*both) for both in zip(self._encode(texts), seconds)]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum()))
        ids += 1
        ids[ids == 1] = 3  # <unk>
        return ids, lengths

    def _row(self, first: list[int], second: list[int] | None) -> list[int]:
        room, (kind, stride) = self.max_length - 2, self.long_texts
        if kind != "windows" or len(first) <= room:
            return add_special_tokens(first, second, self.max_length, kind == "head-tail")
        starts = [*range(0, len(first) - room, stride), len(first) - room]  # the last one ends with the text
        return [n for start in starts for n in add_special_tokens(first[start : start + room], None, self.max_length)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Return every text's SentencePiece ids; an added token's is its id - 1."""
        if not self.added:  # SentencePiece starts a thread for a list, which takes as long as ten texts
            return self.pieces.Encode(texts) if len(texts) > 10 else [*map(self.pieces.Encode, texts)]
        found = []
        for text in texts:
            ids, end = [], 0
            for match in self._any_added.finditer(text):
                ids += [*self.pieces.Encode(text[end : match.start()]), self._added_ids[(match.lastindex or 1) - 1]]
                end = match.end()
            found.append([*ids, *self.pieces.Encode(text[end:])])
        return found

    def pieces_of(self, ids: list[int]) -> list[str]:
        """Return the pieces that ids stand for; 0 to 3 are the same for all tokenizers."""
        names = {token.id: token.content for token in self.added}
        return [names.get(n) or (str(n) if n < 4 else self.pieces.IdToPiece(n - 1)) for n in ids]

    def is_longer(self, text: str, pair: str | None = None) -> bool:
        """Whether this row is cut."""
        parts = self._encode([part for part in (text, pair) if part is not None])
        return sum(len(part) + 2 for part in parts) > self.max_length
