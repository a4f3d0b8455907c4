"""Ids: XLM-R's numbering, cuts, added tokens, other families, tokenizer.json; see end_to_end/test_model_folders.py."""

import io
import json
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SMALL_ENCODER, change_json, needs_small_encoder, refusal, user_error
from running import printed_by
from sentencepiece import SentencePieceTrainer

from sst2_xlmr.data.rows import ReadOptions
from sst2_xlmr.data.token_cache import tokenize_files
from sst2_xlmr.model.encoders import TOKENIZER_NAME
from sst2_xlmr.model.tokenizer import CUT, Tokenizer
from sst2_xlmr.model.tokenizer_files import JSON_NAME, SETTINGS_NAME, added_tokens, tokenizer_digest, tokenizer_json
from sst2_xlmr.programs import export
from sst2_xlmr.task import SingleLabel


def ids_of(tokenizer: Tokenizer, texts: list[str], pairs: list[str] | None = None) -> list[list[int]]:
    ids, lengths = tokenizer.flat_ids(texts, pairs)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


@needs_small_encoder
def test_known_answer() -> None:
    tokenizer = Tokenizer(SMALL_ENCODER / "sentencepiece.bpe.model", 256)
    assert ids_of(tokenizer, ["Hello World!"]) == [[0, 35378, 6661, 38, 2]]
    # As published in fairseq's examples/xlmr/README.md.
    published = {
        "Hello world!": [0, 35378, 8999, 38, 2],
        "你好，世界": [0, 6, 124084, 4, 3221, 2],  # noqa: RUF001
        "नमस्ते दुनिया": [0, 68700, 97883, 29405, 2],
        "مرحبا بالعالم": [0, 665, 193478, 258, 1705, 77796, 2],
        "Bonjour le monde": [0, 84602, 95, 11146, 2],
    }
    assert ids_of(tokenizer, list(published)) == list(published.values())


PAIRS = [
    ("A fine film.", "It was good."),
    ("short", "a long story about a film that nobody will ever see again"),
    ("a long story about a film that nobody will ever see again", "short"),
    ("the same length as that", "the same length as that"),
    ("", "only a second"),
    ("only a first", ""),
    ("汉", "\U0001f600 café"),
]


@pytest.mark.parametrize("max_length", range(5, 30))
def test_pairs_are_joined_and_cut_as_transformers_does(tiny_encoder: Path, max_length: int) -> None:
    transformers = pytest.importorskip("transformers")
    file = tiny_encoder / "sentencepiece.bpe.model"
    reference, ours = transformers.XLMRobertaTokenizer.from_pretrained(tiny_encoder), Tokenizer(file, max_length)
    texts, pairs = map(list, zip(*PAIRS))
    if not reference.is_fast:  # transformers 5 has fast tokenizers only, which cut pairs in another way
        expected = reference(texts, pairs, truncation="longest_first", max_length=max_length)["input_ids"]
        assert ids_of(ours, texts, pairs) == expected
    alone = ["A fine film.", "It did not hold me for a minute", "word " * 100]
    assert reference(alone, truncation=True, max_length=max_length)["input_ids"] == ids_of(ours, alone)
    whole = reference(texts, pairs)["input_ids"]
    assert [ours.is_longer(*pair) for pair in PAIRS] == [len(ids) > max_length for ids in whole]


def ids_in(file: Path, text: str) -> list[int]:
    return Tokenizer(file, 99).flat_ids([text])[0].tolist()


@pytest.fixture
def file(tiny_encoder: Path, tmp_path: Path) -> Path:
    """A SentencePiece model with nothing beside it."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / TOKENIZER_NAME).write_bytes((tiny_encoder / TOKENIZER_NAME).read_bytes())
    return tmp_path / "tokenizer" / TOKENIZER_NAME


def add(file: Path, **tokens: dict[str, Any]) -> None:
    entries = {str(700 + i): {"content": token, **options} for i, (token, options) in enumerate(tokens.items())}
    (file.parent / SETTINGS_NAME).write_text(json.dumps({"added_tokens_decoder": entries}))


def test_what_is_between_added_tokens_is_cut_alone(file: Path) -> None:
    plain = {text: ids_in(file, text)[1:-1] for text in ("a fine", "film", "fine", "fine film")}
    add(file, X={}, XX={})
    assert ids_in(file, "a fine X film") == [0, *plain["a fine"], 700, *plain["film"], 2]
    assert ids_in(file, "XfineX X") == [0, 700, *plain["fine"], 700, 700, 2]
    assert ids_in(file, "XXX") == [0, 701, 700, 2], "the longest first"
    assert ids_in(file, "fine film") == [0, *plain["fine film"], 2]
    tokenizer = Tokenizer(file, 5)
    assert tokenizer.vocab_size == 702
    assert tokenizer.flat_ids(["X X X X X"])[0].tolist() == [0, 700, 700, 700, 2]
    assert tokenizer.is_longer("X X X X") and not tokenizer.is_longer("X X X")
    assert tokenizer.pieces_of([0, 700, 2]) == ["0", "X", "2"]

    add(file, X={"single_word": True})
    assert 700 not in ids_in(file, "Xa aX aXa X1")
    assert ids_in(file, "X, X").count(700) == 2


def test_newer_files_win_and_xlmrs_own_tokens_are_not_counted(file: Path) -> None:
    (file.parent / "added_tokens.json").write_text('{"old": 700, "<mask>": 501}')
    assert [token.content for token in added_tokens(file)] == ["old"]
    add(file, newer={}, **{"<pad>": {}})
    assert [token.content for token in added_tokens(file)] == ["newer"]
    entry = {"id": 9, "content": "newest", "lstrip": True, "special": True, "normalized": False}
    (file.parent / JSON_NAME).write_text(json.dumps({"added_tokens": [entry], "model": {"vocab": []}}))
    assert [token.content for token in added_tokens(file)] == ["newest"]
    assert added_tokens(file)[0].lstrip
    (file.parent / JSON_NAME).write_text(json.dumps({"model": {"vocab": []}, "added_tokens": [entry]}))
    assert [token.content for token in added_tokens(file)] == ["newest"], "whatever the order of the parts"


def test_tokens_that_are_added_later_make_another_tokenizer(file: Path, tmp_path: Path) -> None:
    """The digest decides whether cached tokens are taken, and whether a run is continued."""
    (tmp_path / "rows.tsv").write_text("sentence\tlabel\na X film\t0\nno\t1\n")
    task, digests, ids = SingleLabel(["a", "b"]), set(), set()
    every: list[dict[str, Any]] = [{}, {"X": {}}, {"X": {"rstrip": True}}]
    for tokens in every:
        add(file, **tokens)
        digests.add(tokenizer_digest(file))
        ids.add(str(tokenize_files([tmp_path / "rows.tsv"], (file, 64, CUT), ReadOptions(), task).ids))
    assert (len(digests), len(ids)) == (3, 2)


def test_forms_with_sentencepiece_alone_are_refused(model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(model, tmp_path / "model"))
    change_json(model / JSON_NAME, added_tokens=[{"id": 7, "content": "X"}])
    pytest.importorskip("onnxruntime_extensions")
    options = ["--model", str(model), "--output", str(tmp_path / "x"), "--format"]
    says = user_error(export.main, [*options, "onnx"])
    assert "--format onnx has only SentencePiece, but tokens were added to this model's; use hf, onnx-hf, or" in says
    export.main([*options, "onnx", "--from-ids"])


def steps(content: Any) -> Any:
    return content["normalizer"]["normalizers"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda c: c["model"].update(type="BPE", vocab={}, merges=[]), "its model is BPE, not Unigram"),
        (lambda c: c["model"].update(unk_id=0), "not Unigram with <unk> as 3"),
        (lambda c: c["model"]["vocab"].reverse(), "its first tokens are not <s> <pad> </s> <unk>"),
        (lambda c: c.update(normalizer=None), "its normalizer has lost SentencePiece's rules"),
        (lambda c: steps(c).append({"type": "StripAccents"}), "its normalizer has StripAccents"),
        (lambda c: steps(c).append({"type": "Replace", "pattern": {"String": "``"}}), "normalizer has Replace '``'"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(prepend_scheme="never"), "is not Metaspace with a"),
        (lambda c: c.update(post_processor=None), "its post_processor makes nothing of a single, not <s>A</s>"),
        (lambda c: c["post_processor"]["pair"].pop(2), "makes <s>A</s>B</s> of a pair, not <s>A</s></s>B</s>"),
        (lambda c: c["model"].update(vocab=[["<s>"]]), "cannot read the tokenizer "),
    ],
)
def test_another_familys_json_is_refused(tiny_encoder: Path, tmp_path: Path, spoil: Any, says: str) -> None:
    content = json.loads((tiny_encoder / JSON_NAME).read_text(encoding="utf-8"))
    spoil(content)
    (tmp_path / JSON_NAME).write_text(json.dumps(content), encoding="utf-8")
    line = refusal(Tokenizer, tmp_path / JSON_NAME, 64)
    assert says in line and str(tmp_path / JSON_NAME) in line


@pytest.fixture(params=["tiny", pytest.param("small", marks=needs_small_encoder)])
def model_file(request: pytest.FixtureRequest, tiny_encoder: Path) -> Path:
    return (tiny_encoder if request.param == "tiny" else SMALL_ENCODER) / TOKENIZER_NAME


TEXTS = [
    "배터리가 하루도 못 가요, 국물이 짜고 김치는 싱거웠어요.",
    "映画は長かったけど、最後の場面で泣いた。ガギグゲゴ パピプペポ",
    "ｶﾞｷﾞｸﾞ ﾊﾟﾋﾟﾌﾟ ｱｲｳｴｵ ﾊﾞﾅﾅ ～ 〜 ~ ｆｕｌｌ",  # noqa: RUF001
    "Tiếng Việt có nhiều dấu: ừ, ệ, ỗ, ẵ; Ünïcödé, łódź, İstanbul",
    "होटल का कमरा साफ़ था, क़िला ख़राब ज़रूर; காபி சூடாக இருந்தது",
    "الفندق نظيف جدًّا والموقع مُمتاز ﷺ ﻻً",
    "Πολύ ωραία παράσταση; Электричка, её ёлка; הַסֵּפֶר",
    "ﬁ ① ½ ㍿ ㌀ ℃ № ™ Ⅷ ㎏ ǅ",
    "q\u0307\u0323 e\u0301\u0323 a\u0323\u0301",
    "a\u0085b a\u200bb a\u200db a\ufeffb a\u00adb a\u2028b a\u3000b a\u00a0b a\u2003b\ta\nb  c ",
    "\u202aleft\u202c \u200e \u200f \u2060",
    "👨\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪 ☺\ufe0f",
]


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_cuts_texts_as_sentencepiece_does(model_file: Path, tmp_path: Path, form: Any) -> None:
    """However their characters are written; what transformers converts cuts decomposed Korean otherwise."""
    tokenizers = pytest.importorskip("tokenizers")
    content, ours = tokenizer_json(model_file) or b"", Tokenizer(model_file, 999)
    theirs = tokenizers.Tokenizer.from_str(content.decode())
    (tmp_path / JSON_NAME).write_bytes(content)
    assert theirs.token_to_id("<mask>") == ours.vocab_size == Tokenizer(tmp_path / JSON_NAME, 999).vocab_size
    for text in (unicodedata.normalize(form, text) for text in TEXTS):
        assert theirs.encode(text).ids == ours.flat_ids([text])[0].tolist(), ascii(text)
        assert theirs.encode(text, text).ids == ours.flat_ids([text], [text])[0].tolist()


@pytest.mark.parametrize(
    "other", ["sentencepiece.sentencepiece_model_pb2", "transformers.utils.sentencepiece_model_pb2_new"]
)
def test_other_classes_of_the_same_message_can_be_imported_too(tiny_encoder: Path, other: str) -> None:
    """In one process, protobuf takes only one file of a name into its common pool."""
    pytest.importorskip(other.partition(".")[0])
    code = (
        "import importlib, pathlib, sys; from sst2_xlmr.model.tokenizer_files import tokenizer_json;"
        f"tokenizer_json(pathlib.Path(sys.argv[1])); importlib.import_module({other!r})"
    )
    printed_by(ROOT, sys.executable, "-c", code, tiny_encoder / TOKENIZER_NAME)


def test_another_kind_of_model_gives_none(tmp_path: Path) -> None:
    """XLM-R's is a unigram model; of another, a file that claims to be one would cut texts wrongly."""
    trained = io.BytesIO()
    options: dict[str, Any] = {"model_writer": trained, "vocab_size": 40, "model_type": "bpe", "minloglevel": 2}
    lines = iter(["a few words about nothing", "and some more words about it"] * 20)
    SentencePieceTrainer.train(sentence_iterator=lines, **options)
    (tmp_path / "bpe.model").write_bytes(trained.getvalue())
    assert tokenizer_json(tmp_path / "bpe.model") is None
