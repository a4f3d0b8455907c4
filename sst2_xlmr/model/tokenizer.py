"""XLM-R text -> ids, with SentencePiece."""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor

from sst2_xlmr.model.tokenizer_files import added_tokens, sentencepiece_model
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import read_errors

BEGIN, END, UNKNOWN = 0, 2, 3  # ids of <s>, </s> and <unk>


class LongTexts(NamedTuple):
    """How texts longer than `max_length` are handled; see `Config.long_texts` and `Config.stride`."""

    kind: str = "cut"
    stride: int = 0


CUT = LongTexts()


def window_starts(ids: np.ndarray) -> np.ndarray:
    """Return bool [tokens], True where a window begins: at `<s>` after `</s>`; `ids` are concatenated rows."""
    is_start = np.asarray(ids) == BEGIN
    is_start[1:] &= ids[:-1] == END
    return is_start


def add_special_tokens(first: list[int], second: list[int] | None, max_length: int, head_tail: bool) -> list[int]:
    """Return a row's SentencePiece ids, at most `max_length`: `<s> a </s>`, or for a pair `<s> a </s></s> b </s>`.

    With `head_tail`, a text that is too long keeps its beginning, a quarter of the result, and its end (Sun et al.
    2019, https://arxiv.org/abs/1905.05583: 128 + 382 tokens). A pair that is too long loses tokens from the end of the
    longer text, or of the second if both are equally long, as with `longest_first` of transformers 4's
    `XLMRobertaTokenizer`. `<s>` is -1 and `</s>` 1, because `Tokenizer` adds 1 to every id. The export compiles this
    function with TorchScript.
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
    """Turns texts into XLM-R's ids; thread-safe.

    The ids are fairseq's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, and for every other piece its SentencePiece id + 1
    (SentencePiece's own 0 is `<unk>`). Special tokens that occur in a text are treated as ordinary text. As in
    transformers, added tokens are matched first, and SentencePiece splits the text between them.
    """

    def __init__(self, file: Path, max_length: int, long_texts: LongTexts = CUT) -> None:
        """Load a SentencePiece model or a tokenizer.json, and added tokens; UserError for another kind of tokenizer."""
        self.file, self.max_length, self.long_texts = file, max_length, long_texts
        with read_errors(f"{file} as a SentencePiece model", "fetch it again"):
            self.pieces = SentencePieceProcessor(model_proto=sentencepiece_model(file) or b"empty", num_threads=1)
        if [self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id()] != [0, 1, 2]:
            raise UserError(f"{file} is not XLM-R's tokenizer, whose first pieces are <unk>, <s> and </s>")
        self.added = added_tokens(file)
        self.vocab_size: int = max([self.pieces.GetPieceSize(), *(token.id for token in self.added)]) + 1
        longest_first = sorted(self.added, key=lambda token: -len(token.content))
        self._added_ids = [token.id - 1 for token in longest_first]
        patterns = []  # each with one group, the token
        for token in longest_first:
            pattern = f"({re.escape(token.content)})"
            pattern = rf"(?<!\w){pattern}(?!\w)" if token.single_word else pattern
            patterns.append(r"\s*" * token.lstrip + pattern + r"\s*" * token.rstrip)
        self._any_added = re.compile("|".join(patterns))

    def flat_ids(self, texts: list[str], pairs: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of all rows, int32 [tokens], and the number of tokens per row, int64 [rows].

        A row is one or more windows, each with its own `<s>` and `</s>`. `pairs` are the rows' second texts, if any.
        """
        seconds = [None] * len(texts) if pairs is None else self._encode(pairs)
        rows = [self._row(first, second) for first, second in zip(self._encode(texts), seconds)]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum()))
        ids += 1
        ids[ids == 1] = UNKNOWN
        return ids, lengths

    def _row(self, first: list[int], second: list[int] | None) -> list[int]:
        room, (kind, stride) = self.max_length - 2, self.long_texts
        if kind != "windows" or len(first) <= room:
            return add_special_tokens(first, second, self.max_length, kind == "head-tail")
        starts = [*range(0, len(first) - room, stride), len(first) - room]  # the last window ends with the text
        return [n for start in starts for n in (-1, *first[start : start + room], 1)]  # see `add_special_tokens`

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Return the SentencePiece ids of each text; for an added token, its id - 1."""
        if not self.added:  # for a list, SentencePiece starts a thread, which takes as long as ten texts
            return self.pieces.Encode(texts) if len(texts) > 10 else [*map(self.pieces.Encode, texts)]
        ids_of_texts = []
        for text in texts:
            ids, end = [], 0
            for match in self._any_added.finditer(text):
                ids += [*self.pieces.Encode(text[end : match.start()]), self._added_ids[(match.lastindex or 1) - 1]]
                end = match.end()
            ids_of_texts.append([*ids, *self.pieces.Encode(text[end:])])
        return ids_of_texts

    def pieces_of(self, ids: list[int]) -> list[str]:
        """Return the piece of each id; the special ids 0 to 3 stay numbers."""
        added = {token.id: token.content for token in self.added}
        return [added.get(n) or (str(n) if n < 4 else self.pieces.IdToPiece(n - 1)) for n in ids]

    def is_longer(self, text: str, pair: str | None = None) -> bool:
        """Whether a row has more than `max_length` tokens."""
        ids_of_texts = self._encode([text] if pair is None else [text, pair])
        return sum(len(ids) + 2 for ids in ids_of_texts) > self.max_length
