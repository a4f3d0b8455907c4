"""Write `tokenizer.json` for a SentencePiece model, so that `transformers` needs no further package to open the folder.

Without it AutoTokenizer converts `sentencepiece.bpe.model` at every start, which needs the packages sentencepiece and
protobuf. The format is that of https://github.com/huggingface/tokenizers; the parts are those that transformers' own
conversion makes for XLM-R.
"""

from __future__ import annotations

import base64
import functools
import json
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

UNIGRAM = 1  # of TrainerSpec.ModelType, and its default
_SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # XLM-R's ids 0 to 3; <mask> is the last


@functools.lru_cache(maxsize=1)  # takes a second; a run writes it with every better model
def tokenizer_json(model_file: Path) -> bytes | None:
    """Return the content of `tokenizer.json`, or None if the model is of another kind than XLM-R's (unigram)."""
    model = model_class().FromString(model_file.read_bytes())
    if model.trainer_spec.model_type != UNIGRAM:
        return None
    charsmap = model.normalizer_spec.precompiled_charsmap
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    # SentencePiece's own first three are <unk>, <s> and </s>.
    vocab = [(token, 0.0) for token in _SPECIAL_TOKENS] + pieces[3:] + [("<mask>", 0.0)]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    special = [*enumerate(_SPECIAL_TOKENS), (len(vocab) - 1, "<mask>")]
    added = [{"id": number, "content": token, "lstrip": token == "<mask>", **flags} for number, token in special]
    content = json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
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


def model_class() -> Any:
    """Return the protobuf class of a SentencePiece model, with only the fields that are read here.

    sentencepiece and transformers each bring a class for the same message, and the second of them to be imported fails
    with "duplicate file name"; this class is in a pool of its own. Numbers and defaults are those of
    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
    """

    def field(name: str, number: int, kind: str, label: str = "OPTIONAL", **more: str) -> dict[str, Any]:
        return {"name": name, "number": number, "type": f"TYPE_{kind}", "label": f"LABEL_{label}", **more}

    messages = {
        "Piece": [field("piece", 1, "STRING"), field("score", 2, "FLOAT")],
        "Trainer": [field("model_type", 3, "INT32", defaultValue=str(UNIGRAM))],
        "Normalizer": [field("precompiled_charsmap", 2, "BYTES")],
        "Model": [
            field("pieces", 1, "MESSAGE", "REPEATED", typeName="Piece"),
            field("trainer_spec", 2, "MESSAGE", typeName="Trainer"),
            field("normalizer_spec", 3, "MESSAGE", typeName="Normalizer"),
        ],
    }
    schema = {"name": "model.proto", "messageType": [{"name": n, "field": fields} for n, fields in messages.items()]}
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(json_format.ParseDict(schema, descriptor_pb2.FileDescriptorProto()).SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Model"))


def _template(*parts: str) -> list[dict[str, Any]]:
    return [{"Sequence" if part in "AB" else "SpecialToken": {"id": part, "type_id": 0}} for part in parts]
