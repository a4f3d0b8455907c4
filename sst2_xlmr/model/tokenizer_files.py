"""A folder's tokenizer, as people have it: a SentencePiece model or tokenizer.json, and the tokens added to it.

Both become a SentencePiece model, so that whatever a folder has, all forms of a model give the same ids. The format of
tokenizer.json is that of https://github.com/huggingface/tokenizers.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of_input, read_json

JSON_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # XLM-R's ids 0 to 3; <mask> is the last
MASK = "<mask>"
UNIGRAM = 1  # of TrainerSpec.ModelType, and its default
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # of SentencePiece.Type
# NFKC would make U+FF5E "~", which SentencePiece's rules leave alone, so it is put aside as a character of no text.
WIDE_TILDE, ASIDE = "\uff5e", "\ufdd0"
_KNOWN_STEPS = {"Precompiled", "NFC", "NFKC", "Strip", *(f"Replace {c!r}" for c in (" {2,}", WIDE_TILDE, ASIDE))}
_TEMPLATES = {"single": "<s>A</s>", "pair": "<s>A</s></s>B</s>"}


class AddedToken(NamedTuple):
    """A token that is looked for in a text before SentencePiece cuts what is left.

    lstrip, rstrip: it takes the white space before or after it along; single_word: not inside a word.
    """

    content: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def added_tokens(file: Path) -> list[AddedToken]:
    """Return the tokens that were added to the tokenizer in this file, by what lies beside it; not XLM-R's own five."""
    folder = file.parent
    settings = _read(folder / SETTINGS_NAME)
    if (folder / JSON_NAME).is_file():
        entries = _without_vocabulary(folder / JSON_NAME).get("added_tokens") or []
    elif "added_tokens_decoder" in settings:
        entries = [{**entry, "id": int(number)} for number, entry in settings["added_tokens_decoder"].items()]
    else:
        entries = [{"id": number, "content": token} for token, number in _read(folder / "added_tokens.json").items()]
    own = {*SPECIAL_TOKENS, MASK}
    with _expecting_a_tokenizer(folder):
        return [
            AddedToken(**{name: entry[name] for name in AddedToken._fields if name in entry})
            for entry in entries
            if entry["content"] not in own
        ]


def check_settings(file: Path) -> None:
    """Raise UserError if what lies beside a tokenizer's file asks for what is not done here."""
    settings = _read(file.parent / SETTINGS_NAME)
    for key, value in (("do_lower_case", False), ("truncation_side", "right")):
        if settings.get(key, value) != value:
            cure = f"change the texts in your files instead, and set it to {json.dumps(value)}"
            raise UserError(f"{file.parent / SETTINGS_NAME}: {key} is {settings[key]!r}, and not followed here; {cure}")
    if (file := file.with_name(JSON_NAME)).is_file():
        _steps(_without_vocabulary(file), file)


def tokenizer_digest(file: Path) -> str:
    """Return SHA-256, hexadecimal, of what decides a tokenizer's ids; of a file without added tokens, the file's."""
    digest, added = digest_of_input(file), added_tokens(file)
    return hashlib.sha256(repr((digest, added)).encode()).hexdigest() if added else digest


def sentencepiece_model(file: Path) -> bytes:
    """Return a tokenizer's SentencePiece model: the file's content, or made from a tokenizer.json.

    UserError if that is no tokenizer of XLM-R's kind.
    """
    if file.name != JSON_NAME:
        return file.read_bytes()
    with _expecting_a_tokenizer(file):
        return _from_json(file)


@contextlib.contextmanager
def _expecting_a_tokenizer(file: Path) -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not what a tokenizer saves ({error!r}); copy it again") from None


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
    metaspaces = [part for part in splits if part["type"] == "Metaspace"]
    if len(metaspaces) != 1 or metaspaces[0].get("prepend_scheme", "always") == "never":
        _refuse(file, "its pre_tokenizer is not Metaspace with a space before every text")
    post = content.get("post_processor") or {}
    for name, expected in _TEMPLATES.items():
        found = "".join(part["id"] for entry in post.get(name, []) for part in entry.values())
        if found != expected and post.get("type") != "RobertaProcessing":
            _refuse(file, f"its post_processor makes {found or 'nothing'} of a {name}, not {expected}")
    pieces = [(token, score) for token, score in (vocab[:-1] if vocab[-1][0] == MASK else vocab)[4:]]
    return sentencepiece_proto(pieces, base64.b64decode(charsmaps[0]))


def sentencepiece_proto(pieces: Iterable[tuple[str, float]], charsmap: bytes) -> bytes:
    """Return a serialized SentencePiece unigram model.

    Args:
        pieces: with their scores, from XLM-R's id 4 on; no text is cut into <mask>.
        charsmap: the compiled rules of its normalizer.
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
    """Return the protobuf class of a SentencePiece model, with only the fields that are used here.

    sentencepiece and transformers each bring a class for the same message, and the second of them to be imported fails
    with "duplicate file name"; this class is in a pool of its own. Numbers and defaults are those of
    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
    """

    def field(name: str, number: int, kind: str, label: str = "OPTIONAL", **more: str) -> dict[str, Any]:
        return {"name": name, "number": number, "type": f"TYPE_{kind}", "label": f"LABEL_{label}", **more}

    messages = {
        "Piece": [
            field("piece", 1, "STRING"),
            field("score", 2, "FLOAT"),
            field("type", 3, "INT32", defaultValue="1"),
        ],
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


def _steps(content: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer.json's normalizer; UserError for one that SentencePiece's rules do not have."""
    with _expecting_a_tokenizer(file):
        steps = _flat(content.get("normalizer"), "normalizers")
        for step in steps:
            step_in_words = " ".join([step["type"], *map(repr, step.get("pattern", {}).values())])
            if step_in_words not in _KNOWN_STEPS:
                _refuse(file, f"its normalizer has {step_in_words}")
    return steps


def _flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the parts of a sequence, or the one that there is."""
    return (part[key] if part["type"] == "Sequence" else [part]) if part else []


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, "copy it again") if file.is_file() else {}


def _without_vocabulary(file: Path) -> dict[str, Any]:
    """Return the content of a tokenizer.json without its largest part, which takes half a second to read."""
    head, _, _ = file.read_bytes().partition(b'"model":')
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(head.rstrip().rstrip(b",") + b"}")
        if {"added_tokens", "normalizer"} <= found.keys():
            return found
    return read_json(file, "copy it again")  # the parts are in another order


def _refuse(file: Path, problem: str) -> NoReturn:
    raise UserError(
        f"{file}: {problem}, so it is not read as XLM-R's; put the model's own sentencepiece.bpe.model in its place"
    )
