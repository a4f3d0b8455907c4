"""Write `tokenizer.json` for a SentencePiece model, so that `transformers` needs no further package to open the folder.

Without it AutoTokenizer converts `sentencepiece.bpe.model` at every start, for which it wants the packages
sentencepiece and protobuf. The file's format is that of https://github.com/huggingface/tokenizers; its parts are those
that transformers' own conversion makes for XLM-R.
"""

from __future__ import annotations

import base64
import functools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_UNIGRAM = 1  # TrainerSpec.ModelType in sentencepiece_model.proto, and its default
_SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # XLM-R's ids 0 to 3; <mask> is the last


@functools.lru_cache(maxsize=1)  # takes a second; a run writes it with every better model
def tokenizer_json(model_file: Path) -> bytes | None:
    """Return the content of `tokenizer.json`, or None if the model is of another kind than XLM-R's (unigram)."""
    pieces: list[tuple[str, float]] = []
    charsmap, kind = b"", _UNIGRAM
    for number, value in _fields(model_file.read_bytes()):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0))
        elif number == 2:
            kind = dict(_fields(value)).get(3, _UNIGRAM)
        elif number == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    if kind != _UNIGRAM:
        return None
    # SentencePiece's own first three are <unk>, <s> and </s>.
    vocab = [(token, 0.0) for token in _SPECIAL_TOKENS] + pieces[3:] + [("<mask>", 0.0)]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    content = json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added_token(i, t) for i, (t, _) in enumerate(vocab) if i < 4 or i == len(vocab) - 1],
            "normalizer": normalizer if charsmap else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": _template("<s>", "A", "</s>"),
                "pair": _template("<s>", "A", "</s>", "</s>", "B", "</s>"),
                "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (("<s>", 0), ("</s>", 2))},
            },
            "decoder": metaspace,
            "model": {"type": "Unigram", "unk_id": 3, "vocab": vocab, "byte_fallback": False},
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )
    return content.encode()


def _added_token(number: int, token: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": token == "<mask>", "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": token, **flags}


def _template(*parts: str) -> list[dict[str, Any]]:
    return [{"Sequence" if part in "AB" else "SpecialToken": {"id": part, "type_id": 0}} for part in parts]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protobuf message: an int for a varint, bytes for anything else.

    https://protobuf.dev/programming-guides/encoding/
    """
    at = 0

    def varint() -> int:
        nonlocal at
        result = shift = 0
        while True:
            byte = message[at]
            at += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result
            shift += 7

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[wire_type] if wire_type != 2 else varint()
        yield number, message[at : at + size]
        at += size
