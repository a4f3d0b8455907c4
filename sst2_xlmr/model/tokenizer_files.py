"""A folder's tokenizer: a SentencePiece model, and the tokens added to it.

A tokenizer.json (https://github.com/huggingface/tokenizers) is converted to a SentencePiece model, so that all forms of
a model give the same ids; and a SentencePiece model to a tokenizer.json, in the format of tokenizers 0.13 and later.
"""

import base64
import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from sentencepiece import SentencePieceProcessor

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of_input, read_errors, read_json

JSON_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # XLM-R's ids 0 to 3; <mask> is the last
MASK = "<mask>"
UNIGRAM = 1  # TrainerSpec.ModelType, the default
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # SentencePiece.Type
# NFKC would turn U+FF5E into "~", unlike SentencePiece's rules, so it is replaced by a noncharacter meanwhile.
WIDE_TILDE, PLACEHOLDER = "\uff5e", "\ufdd0"
_KNOWN_STEPS = {"Precompiled", "NFC", "NFKC", "Strip", *(f"Replace {c!r}" for c in (" {2,}", WIDE_TILDE, PLACEHOLDER))}
# A subset of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
_SCHEMA = """
name: "model.proto"
message_type { name: "Piece"
  field { name: "piece" number: 1 type: TYPE_STRING }
  field { name: "score" number: 2 type: TYPE_FLOAT }
  field { name: "type" number: 3 type: TYPE_INT32 default_value: "1" } }
message_type { name: "Trainer" field { name: "model_type" number: 3 type: TYPE_INT32 default_value: "1" } }
message_type { name: "Normalizer" field { name: "precompiled_charsmap" number: 2 type: TYPE_BYTES } }
message_type { name: "Model"
  field { name: "pieces" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Piece" }
  field { name: "trainer_spec" number: 2 type: TYPE_MESSAGE type_name: "Trainer" }
  field { name: "normalizer_spec" number: 3 type: TYPE_MESSAGE type_name: "Normalizer" } }
"""


class AddedToken(NamedTuple):
    """A token that is matched before SentencePiece splits the rest of a text."""

    content: str
    id: int
    lstrip: bool = False  # also matches the white space before it
    rstrip: bool = False  # also matches the white space after it
    single_word: bool = False  # does not match inside a word


def added_tokens(file: Path) -> list[AddedToken]:
    """Return the tokens that a tokenizer's folder adds to it, without XLM-R's own five."""
    folder = file.parent
    settings = _read(folder / SETTINGS_NAME)
    with read_errors(f"the tokenizer in {folder}", "copy it again"):
        if (folder / JSON_NAME).is_file():
            entries = _read(folder / JSON_NAME).get("added_tokens") or []
        elif "added_tokens_decoder" in settings:
            entries = [{**entry, "id": int(number)} for number, entry in settings["added_tokens_decoder"].items()]
        else:
            entries = [{"id": number, "content": name} for name, number in _read(folder / "added_tokens.json").items()]
        tokens = [AddedToken(**{name: e[name] for name in AddedToken._fields if name in e}) for e in entries]
    return [token for token in tokens if token.content not in (*SPECIAL_TOKENS, MASK)]


def checked_settings(file: Path) -> dict[str, Any]:
    """Return a tokenizer's `tokenizer_config.json`, {} if there is none; UserError for an unsupported setting."""
    settings = _read(file.parent / SETTINGS_NAME)
    for key, value in (("do_lower_case", False), ("truncation_side", "right")):
        if settings.get(key, value) != value:
            fix = f"change the texts in your files instead, and set it to {json.dumps(value)}"
            raise UserError(f"{file.parent / SETTINGS_NAME}: {key} is {settings[key]!r}, which is unsupported; {fix}")
    _steps(_read(file.with_name(JSON_NAME)), file.with_name(JSON_NAME))
    return settings


def tokenizer_digest(file: Path) -> str:
    """Return the SHA-256 of a tokenizer's file and added tokens, or of the file alone if there are none."""
    digest, added = digest_of_input(file), added_tokens(file)
    return hashlib.sha256(repr((digest, added)).encode()).hexdigest() if added else digest


def sentencepiece_model(file: Path) -> bytes:
    """Return a tokenizer's serialized SentencePiece model, converted if the file is a tokenizer.json."""
    if file.name != JSON_NAME:
        return file.read_bytes()
    with read_errors(f"the tokenizer {file}", "copy it again"):
        return _from_json(file)


def _from_json(file: Path) -> bytes:
    content = read_json(file, "copy it again")
    model = content.get("model") or {}
    vocab = model.get("vocab")
    if not isinstance(vocab, list) or model.get("unk_id") != 3 or model.get("byte_fallback"):
        _refuse(file, f"its model is {model.get('type')}, not Unigram with <unk> as 3")
    if [token for token, _ in vocab[:4]] != SPECIAL_TOKENS:
        _refuse(file, f"its first tokens are not {' '.join(SPECIAL_TOKENS)}")
    charsmaps = [step["precompiled_charsmap"] for step in _steps(content, file) if step["type"] == "Precompiled"]
    if len(charsmaps) != 1:
        _refuse(file, "its normalizer has lost SentencePiece's rules (some versions of transformers 5 drop them)")
    splits = _flat(content.get("pre_tokenizer"), "pretokenizers")
    metaspaces = [step for step in splits if step["type"] == "Metaspace"]
    if len(metaspaces) != 1 or metaspaces[0].get("prepend_scheme", "always") == "never":
        _refuse(file, "its pre_tokenizer is not Metaspace with a space before every text")
    post = content.get("post_processor") or {}
    for name, expected in (("single", "<s>A</s>"), ("pair", "<s>A</s></s>B</s>")):
        template = "".join(part["id"] for entry in post.get(name, []) for part in entry.values())
        if template != expected and post.get("type") != "RobertaProcessing":
            _refuse(file, f"its post_processor makes {template or 'nothing'} of a {name}, not {expected}")
    pieces = [(token, score) for token, score in (vocab[:-1] if vocab[-1][0] == MASK else vocab)[4:]]
    return sentencepiece_proto(pieces, base64.b64decode(charsmaps[0]))


@functools.lru_cache(maxsize=1)  # it takes a second, and a run writes it with every best model
def tokenizer_json(file: Path) -> bytes | None:
    """Return `tokenizer.json` for a SentencePiece file and its added tokens; None unless it is a unigram model.

    With it, `transformers` and others need no other package. Texts are split exactly as by SentencePiece, unlike with
    transformers' own conversion: `tokenizers` applies SentencePiece's rules one code point at a time, which is wrong
    for decomposed Korean, half-width Japanese and Arabic ligatures. So NFKC is applied first, with which all but one of
    these rules begin, and only the space separates words.
    """
    serialized = sentencepiece_model(file)
    model = model_class().FromString(serialized)
    if model.trainer_spec.model_type != UNIGRAM:
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
    added += [{**flags, **token._asdict(), "special": False} for token in added_tokens(file)]
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


def sentencepiece_proto(pieces: Iterable[tuple[str, float]], charsmap: bytes) -> bytes:
    """Return a serialized SentencePiece unigram model.

    `pieces` are pieces and scores from XLM-R's id 4 on; <mask> becomes a control symbol, so no text contains it.
    `charsmap` is the compiled normalizer.
    """
    model = model_class()()
    model.trainer_spec.model_type = UNIGRAM
    model.normalizer_spec.precompiled_charsmap = charsmap
    add = model.pieces.add
    for name, kind in (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)):
        add(piece=name, score=0.0, type=kind)
    for name, score in pieces:
        add(piece=name, score=score, type=CONTROL if name == MASK else NORMAL)
    return bytes(model.SerializeToString())


@functools.cache
def model_class() -> Any:
    """Return the protobuf class of a SentencePiece model, in its own descriptor pool."""
    # sentencepiece and transformers both register a class for this message; whichever is imported second fails with
    # "duplicate file name".
    schema = text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(schema.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Model"))


def _steps(content: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer.json's normalizer; UserError for one that SentencePiece's rules lack."""
    with read_errors(f"the tokenizer {file}", "copy it again"):
        steps = _flat(content.get("normalizer"), "normalizers")
        for step in steps:
            name = " ".join([step["type"], *map(repr, step.get("pattern", {}).values())])
            if name not in _KNOWN_STEPS:
                _refuse(file, f"its normalizer has {name}")
    return steps


def _flat(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a sequence, or the single step as a list."""
    return (step[key] if step["type"] == "Sequence" else [step]) if step else []


def _read(file: Path) -> dict[str, Any]:
    """Return a JSON file's content, {} if it does not exist; a tokenizer.json without its vocabulary (0.5 s faster)."""
    if not file.is_file():
        return {}
    head, _, _ = file.read_bytes().partition(b'"model":')
    with contextlib.suppress(ValueError):
        content: dict[str, Any] = json.loads(head.rstrip().rstrip(b",") + b"}")
        if {"added_tokens", "normalizer"} <= content.keys():
            return content
    return read_json(file, "copy it again")  # another file, or keys in another order


def _refuse(file: Path, problem: str) -> NoReturn:
    raise UserError(f"{file}: {problem}, unlike XLM-R's; replace it with the model's own sentencepiece.bpe.model")
