"""The forms for using a model elsewhere: ONNX, also in 8 bits, and a trimmed vocabulary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import user_error
from sentencepiece import SentencePieceProcessor

from sst2_xlmr.evaluation.evaluate import predict
from sst2_xlmr.export.trimmed import needed_pieces, trimmed_tokenizer
from sst2_xlmr.model.classifier import load_classifier
from sst2_xlmr.model.encoders import TOKENIZER_NAME, find_encoder
from sst2_xlmr.programs import export

CPU = torch.device("cpu")
TEXTS = ["A fine film.", "", "word " * 300, "  It was  slow,\tand long ", "Кино 映画 ταινία", "no", "\U0001f600"] * 5

# Runs where neither torch nor sst2_xlmr can be imported; argv: the file, JSON for the inputs, where the answers go.
USE_ALONE = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "sst2_xlmr", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import numpy, onnxruntime, onnxruntime_extensions
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
session = onnxruntime.InferenceSession(sys.argv[1], options)
kinds = {"text": object, "input_ids": "int64", "attention_mask": "int64"}
inputs = {name: numpy.array(values, dtype=kinds[name]) for name, values in json.load(open(sys.argv[2])).items()}
labels, probabilities = session.run(["label", "probabilities"], inputs)
said = session.get_modelmeta().custom_metadata_map
json.dump([list(labels), probabilities.tolist(), said], open(sys.argv[3], "w"))
"""


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    file = tmp_path / "rows.tsv"
    file.write_text("text\tlabel\n" + "".join(f"film number {n} was fine\t{'ab'[n % 2]}\n" for n in range(40)))
    return file


def run_export(*options: object) -> None:
    export.main([str(option) for option in options])


def probabilities_of(model: Path, texts: list[str]) -> np.ndarray:
    classifier, tokenizer, _ = load_classifier(model, CPU, bf16=False)
    return predict(classifier, tokenizer(texts), 256, CPU).numpy()


def answers_alone(file: Path, inputs: dict[str, Any]) -> tuple[list[str], np.ndarray, dict[str, str]]:
    scratch = file.parent
    (scratch / "inputs").write_text(json.dumps(inputs))
    words = [sys.executable, "-c", USE_ALONE, str(file), "inputs", "answers"]
    alone = subprocess.run(
        words, cwd=scratch, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, check=False
    )
    assert (alone.returncode, alone.stderr) == (0, "")
    labels, probabilities, said = json.loads((scratch / "answers").read_text())
    return labels, np.array(probabilities), said


@pytest.mark.parametrize("from_ids", [False, True])
def test_onnx_answers_alike_without_torch(
    model: Path, tmp_path: Path, from_ids: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its own tokenizer, which cuts long texts; or from ids, padded."""
    pytest.importorskip("onnxruntime_extensions")
    file = tmp_path / "classifier.onnx"
    run_export("--model", model, "--format", "onnx", "--output", file, *(["--from-ids"] if from_ids else []))
    assert "same answers on" in capsys.readouterr().out
    inputs: dict[str, Any] = {"text": TEXTS}
    if from_ids:
        _, tokenizer, _ = load_classifier(model, CPU, bf16=False)
        ids = tokenizer(TEXTS)
        longest = max(map(len, ids))
        padded = [row + [1] * (longest - len(row)) for row in ids]
        inputs = {"input_ids": padded, "attention_mask": [[int(i != 1) for i in row] for row in padded]}
    labels, probabilities, said = answers_alone(file, inputs)
    expected = probabilities_of(model, TEXTS)
    assert np.abs(probabilities - expected).max() < 1e-5
    assert labels == ["ab"[index] for index in expected.argmax(1)]
    assert said == {"label_names": '["a", "b"]', "max_length": "64"}
    assert len(set(labels)) == 2, "the texts must tell the labels apart"


def test_onnx_of_empty_texts_alone(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_extensions")
    run_export("--model", model, "--format", "onnx", "--output", tmp_path / "x.onnx")
    _, probabilities, _ = answers_alone(tmp_path / "x.onnx", {"text": ["", ""]})
    assert np.abs(probabilities - probabilities_of(model, ["", ""])).max() < 1e-5


def test_onnx_in_8_bits_is_near_and_small(
    model: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime_extensions")
    options = ["--model", model, "--check-file", rows_file, "--most-changed", 100, "--most-lost", 100]
    run_export(*options, "--format", "onnx-int8", "--output", tmp_path / "x.onnx")
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("file  labels changed  largest change")
    assert table[1].startswith("rows ")
    _, probabilities, _ = answers_alone(tmp_path / "x.onnx", {"text": TEXTS})
    expected = probabilities_of(model, TEXTS)
    assert np.abs(probabilities - expected).mean() < 0.3 * expected.std(0).mean()


def test_8_bits_that_change_too_much_are_refused(
    model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def turn_around(*given: Any) -> Any:
        classify = write_onnx_file(*given)
        return lambda *rows: 1 - classify(*rows)

    pytest.importorskip("onnxruntime_extensions")
    write_onnx_file = export.write_onnx_file
    monkeypatch.setattr(export, "write_onnx_file", turn_around)
    options = ["--model", model, "--check-file", f"en={rows_file}", "--output", tmp_path / "out" / "x"]
    line = user_error(lambda: run_export(*options, "--format", "onnx-int8"), capsys)
    assert "int8 changes 40 of 40 labels of fp32, 100.00%, and at most 1.00% are allowed" in line
    assert not list((tmp_path / "out").iterdir())


def test_a_trimmed_model_gives_the_same_answers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit on the texts it was trimmed for; other texts still get an answer, and no character becomes unknown."""
    texts = ["A fine film.", "no", "It was slow, and long"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    run_export(
        "--model", model, "--format", "hf", "--keep-vocabulary-of", tmp_path / "texts.txt", "--output", tmp_path / "t"
    )
    said = capsys.readouterr().out
    before, after = find_encoder(str(model)), find_encoder(str(tmp_path / "t"))
    assert after.shape.vocab_size < before.shape.vocab_size
    assert f"kept {after.shape.vocab_size:,} of {before.shape.vocab_size:,} embedding rows: 3 texts" in said
    assert np.array_equal(probabilities_of(model, texts), probabilities_of(tmp_path / "t", texts))
    old, new = (SentencePieceProcessor(model_file=str(e.tokenizer_file)) for e in (before, after))
    for text in (*texts, "zebra quiz", "Кино 映画", "long words unheard of"):
        assert [old.IdToPiece(i) for i in old.EncodeAsIds(text)].count("<unk>") == [
            new.IdToPiece(i) for i in new.EncodeAsIds(text)
        ].count("<unk>"), text
    assert probabilities_of(tmp_path / "t", ["zebra quiz"]).shape == (1, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t", "texts.txt"]


def test_transformers_opens_a_trimmed_model(model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "texts.csv").write_text('text\n"A fine film, really"\nIt was slow\n')
    options = ["--keep-vocabulary-of", tmp_path / "texts.csv", "--output", tmp_path / "t"]
    run_export("--model", model, "--format", "hf", *options)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "t").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    texts = ["A fine film, really", "It was slow"]
    with torch.no_grad():
        logits = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert np.abs(logits.softmax(-1).numpy() - probabilities_of(tmp_path / "t", texts)).max() < 1e-5


def test_trimming_composes_with_other_forms(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_extensions")
    (tmp_path / "texts.txt").write_text("A fine film.\n")
    run_export("--model", model, "--format", "onnx", "--output", tmp_path / "whole.onnx")
    options = ["--keep-vocabulary-of", tmp_path / "texts.txt", "--output", tmp_path / "small.onnx"]
    run_export("--model", model, "--format", "onnx", *options)
    assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / "whole.onnx").stat().st_size
    _, probabilities, _ = answers_alone(tmp_path / "small.onnx", {"text": ["A fine film."]})
    assert np.abs(probabilities - probabilities_of(model, ["A fine film."])).max() < 1e-5


def test_ids_of_a_trimmed_tokenizer_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime_extensions")
    (tmp_path / "texts.txt").write_text("A fine film.\n")
    options = ["--keep-vocabulary-of", tmp_path / "texts.txt", "--output", tmp_path / "x", "--from-ids"]
    line = user_error(lambda: run_export("--model", model, "--format", "onnx", *options), capsys)
    assert "would leave no tokenizer that gives these ids" in line


def test_a_model_beyond_the_limit_of_a_file_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx_file = pytest.importorskip("sst2_xlmr.export.onnx")
    monkeypatch.setattr(onnx_file, "_LARGEST_FILE", 1000)
    options = ["--model", model, "--format", "onnx", "--output", tmp_path / "x"]
    assert "larger than the 2 GB of an ONNX file" in user_error(lambda: run_export(*options), capsys)


def test_characters_that_only_longer_pieces_have_keep_these(model: Path, tmp_path: Path) -> None:
    """Take a letter's own piece away; the pieces that have it are then the only ones that know it."""
    file = model / TOKENIZER_NAME
    pieces = SentencePieceProcessor(model_file=str(file))
    names = [pieces.IdToPiece(number) for number in range(pieces.GetPieceSize())]
    letters = [name for name in names[3:] if len(name) == 1 and name.isalpha()]
    letter = next(one for one in letters if sum(one in name for name in names) > 2)
    alone = {number for number, name in enumerate(names) if name.lstrip("▁") == letter}
    kept = np.array([number for number in range(len(names)) if number not in alone])
    (tmp_path / "fewer.model").write_bytes(trimmed_tokenizer(file, kept))
    fewer = SentencePieceProcessor(model_file=str(tmp_path / "fewer.model"))
    assert fewer.GetPieceSize() == len(kept)
    needed = {fewer.IdToPiece(number) for number in needed_pieces(fewer, []).tolist()}
    assert {name for name in names if letter in name and name.lstrip("▁") != letter} <= needed
