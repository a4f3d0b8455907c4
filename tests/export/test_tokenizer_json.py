"""tokenizer.json against the SentencePiece model that it is made from; tests/test_transformers.py uses it."""

from __future__ import annotations

import io
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL_ENCODER, needs_small_encoder
from running import printed_by
from sentencepiece import SentencePieceTrainer

from sst2_xlmr.export.tokenizer_json import tokenizer_json
from sst2_xlmr.model.encoders import TOKENIZER_NAME
from sst2_xlmr.model.tokenizer import Tokenizer


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
def test_cuts_texts_as_sentencepiece_does(model_file: Path, form: Any) -> None:
    """However their characters are written; what transformers converts cuts decomposed Korean otherwise."""
    tokenizers = pytest.importorskip("tokenizers")
    content, ours = tokenizer_json(model_file) or b"", Tokenizer(model_file, 999)
    theirs = tokenizers.Tokenizer.from_str(content.decode())
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
        "import importlib, pathlib, sys; from sst2_xlmr.export.tokenizer_json import tokenizer_json;"
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
