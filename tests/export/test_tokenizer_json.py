"""tokenizer.json against the SentencePiece model that it is made from; tests/test_transformers.py uses it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_ENCODER, needs_small_encoder
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from sst2_xlmr.export.tokenizer_json import tokenizer_json
from sst2_xlmr.model.encoders import TOKENIZER_NAME


@pytest.mark.parametrize("which", ["tiny", pytest.param("small", marks=needs_small_encoder)])
def test_pieces(tiny_encoder: Path, which: str) -> None:
    model_file = (tiny_encoder if which == "tiny" else SMALL_ENCODER) / TOKENIZER_NAME
    pieces, content = SentencePieceProcessor(str(model_file)), tokenizer_json(model_file)
    assert content is not None
    vocab = json.loads(content)["model"]["vocab"]
    assert len(vocab) == pieces.GetPieceSize() + 2
    assert [token for token, _ in vocab[:4]] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert vocab[-1][0] == "<mask>"
    for number in range(3, pieces.GetPieceSize()):
        assert vocab[number + 1] == [pieces.IdToPiece(number), pieces.GetScore(number)], number


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
    command = [sys.executable, "-c", code, str(tiny_encoder / TOKENIZER_NAME)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_another_kind_of_model_gives_none(tmp_path: Path) -> None:
    """XLM-R's is a unigram model; of another, a file that claims to be one would cut texts wrongly."""
    trained = io.BytesIO()
    options = {"model_writer": trained, "vocab_size": 40, "model_type": "bpe", "minloglevel": 2}
    lines = iter(["a few words about nothing", "and some more words about it"] * 20)
    SentencePieceTrainer.train(sentence_iterator=lines, **options)
    (tmp_path / "bpe.model").write_bytes(trained.getvalue())
    assert tokenizer_json(tmp_path / "bpe.model") is None
