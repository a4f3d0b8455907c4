"""Write `tokenizer.json` for a SentencePiece model, so that `transformers` and others need no other package.

The format is that of https://github.com/huggingface/tokenizers, from 0.13 on. Texts are split exactly as by
SentencePiece, unlike with transformers' own conversion: `tokenizers` applies SentencePiece's rules one code point at a
time, which is wrong for decomposed Korean, half-width Japanese and Arabic ligatures. So NFKC is applied first, with
which all but one of these rules begin, and only the space separates words.
"""

import base64
import functools
import json
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from sst2_xlmr.model import tokenizer_files
from sst2_xlmr.model.tokenizer_files import MASK, PLACEHOLDER, SPECIAL_TOKENS, WIDE_TILDE


@functools.lru_cache(maxsize=1)  # it takes a second, and a run writes it with every best model
def tokenizer_json(file: Path) -> bytes | None:
    """Return `tokenizer.json` for a SentencePiece file and its added tokens; None unless it is a unigram model."""
    serialized = tokenizer_files.sentencepiece_model(file)
    model = tokenizer_files.model_class().FromString(serialized)
    if model.trainer_spec.model_type != tokenizer_files.UNIGRAM:
        return None
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    # SentencePiece's own first three are <unk>, <s> and </s>.
    vocab = [(token, 0.0) for token in SPECIAL_TOKENS] + pieces[3:] + [(MASK, 0.0)]
    # "add_prefix_space" is for tokenizers 0.13, which does not know "prepend_scheme".
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "add_prefix_space": True}
    space = {"type": "Split", "pattern": {"Regex": " "}, "behavior": "Removed", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [*enumerate(SPECIAL_TOKENS), (len(vocab) - 1, MASK)]
    added = [{**flags, "id": number, "content": token, "lstrip": token == MASK} for number, token in special]
    added += [{**flags, **token._asdict(), "special": False} for token in tokenizer_files.added_tokens(file)]
    begin, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>"))
    first, second = ({"Sequence": {"id": text, "type_id": 0}} for text in "AB")
    normalizer: dict[str, Any] | None = None
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
        ligature, letters = SentencePieceProcessor(model_proto=serialized).Encode(["\ufb01", "fi"])
        if ligature == letters:  # the rules are NFKC and more
            swap = {"type": "Replace", "pattern": {"String": WIDE_TILDE}, "content": PLACEHOLDER}
            back = {"type": "Replace", "pattern": {"String": PLACEHOLDER}, "content": WIDE_TILDE}
            normalizer = {"type": "Sequence", "normalizers": [swap, {"type": "NFKC"}, normalizer, back]}
    content = json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [space, metaspace]},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [begin, first, end],
                "pair": [begin, first, end, end, second, end],
                "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (("<s>", 0), ("</s>", 2))},
            },
            "decoder": metaspace,
            "model": {"type": "Unigram", "unk_id": 3, "vocab": vocab, "byte_fallback": False},
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )
    return content.encode()
