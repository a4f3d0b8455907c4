"""The forms for using a model elsewhere: ONNX, also in 8 bits, TorchScript, and a trimmed vocabulary."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, Capture, needs_torchtext, run_export
from sentencepiece import SentencePieceProcessor

from sst2_xlmr.data.sniff import ReadOptions
from sst2_xlmr.evaluation.evaluate import predict
from sst2_xlmr.export.trimmed import needed_pieces, trimmed_tokenizer
from sst2_xlmr.model.classifier import load_classifier
from sst2_xlmr.model.encoders import TOKENIZER_NAME, find_encoder
from sst2_xlmr.model.tokenizer import Tokenizer
from sst2_xlmr.programs.export import read_checks
from sst2_xlmr.task import SingleLabel

# torch ignores it by itself, pytest does not: torch.nn.functional looks at a size that never changes.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

TEXTS = ["A fine film.", "", "word " * 300, "  It was  slow,\tand long ", "Кино 映画 ταινία", "no", "\U0001f600"] * 5

# Run where packages cannot be imported; argv: their names, the file, JSON for the inputs, where the answers go.
BLOCKED = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split():
            raise ImportError(name)
sys.meta_path.insert(0, Block())
given = json.load(open(sys.argv[3]))
"""
ONNX_ALONE = """
import numpy, onnxruntime, onnxruntime_extensions
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
session = onnxruntime.InferenceSession(sys.argv[2], options)
kinds = {"text": object, "input_ids": "int64", "attention_mask": "int64"}
inputs = {name: numpy.array(values, dtype=kinds[name]) for name, values in given.items()}
labels, probabilities = session.run(["label", "probabilities"], inputs)
said = session.get_modelmeta().custom_metadata_map
json.dump([list(labels), probabilities.tolist(), said], open(sys.argv[4], "w"))
"""
TORCHSCRIPT_ALONE = """
import torch, torchtext
classify = torch.jit.load(sys.argv[2])
labels, probabilities = classify(given)
assert classify([])[0] == [] and classify([])[1].shape == (0, len(classify.label_names))
json.dump([labels, probabilities.tolist(), classify.label_names], open(sys.argv[4], "w"))
"""


def probabilities_of(model: Path, texts: list[str], pairs: list[str] | None = None) -> np.ndarray:
    classifier, tokenizer, task = load_classifier(model, CPU, bf16=False)
    return predict(classifier, task, *tokenizer.flat_ids(texts, pairs), 256, CPU)


def padded_ids(model: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """Return the inputs of an ONNX file that takes ids."""
    _, tokenizer, _ = load_classifier(model, CPU, bf16=False)
    ids = [tokenizer.flat_ids([text])[0].tolist() for text in texts]
    padded = np.array([row + [1] * (max(map(len, ids)) - len(row)) for row in ids])
    return {"input_ids": padded, "attention_mask": (padded != 1).astype(np.int64)}


def answers_alone(program: str, blocked: str, file: Path, inputs: Any) -> tuple[list[str], np.ndarray, Any]:
    """Return labels, probabilities and metadata that a file gives where some packages cannot be imported."""
    (file.parent / "inputs").write_text(json.dumps(inputs))
    words = [sys.executable, "-W", "ignore", "-c", BLOCKED + program, blocked, str(file), "inputs", "answers"]
    env = {**os.environ, "PYTHONPATH": ""}
    alone = subprocess.run(words, cwd=file.parent, env=env, capture_output=True, text=True, check=False)
    assert (alone.returncode, alone.stderr) == (0, "")
    labels, probabilities, said = json.loads((file.parent / "answers").read_text())
    return labels, np.array(probabilities), said


def onnx_answers(file: Path, inputs: dict[str, Any]) -> tuple[list[str], np.ndarray, Any]:
    return answers_alone(ONNX_ALONE, "torch sst2_xlmr transformers", file, inputs)


@pytest.mark.parametrize("from_ids", [False, True])
def test_onnx_answers_alike_without_torch(model: Path, tmp_path: Path, from_ids: bool, capsys: Capture) -> None:
    """With its own tokenizer, which cuts long texts; or from ids, padded."""
    pytest.importorskip("onnxruntime_extensions")
    file = tmp_path / "classifier.onnx"
    run_export("--model", model, "--format", "onnx", "--output", file, *(["--from-ids"] if from_ids else []))
    assert "same answers on" in capsys.readouterr().out
    for texts in [TEXTS, ["", ""]]:
        ids = {name: rows.tolist() for name, rows in padded_ids(model, texts).items()}
        inputs: dict[str, Any] = ids if from_ids else {"text": texts}
        labels, probabilities, said = onnx_answers(file, inputs)
        expected = probabilities_of(model, texts)
        assert np.abs(probabilities - expected).max() < 1e-5
        assert labels == ["ab"[index] for index in expected.argmax(1)]
        assert said == {"label_names": '["a", "b"]', "max_length": "64", "problem_type": "single_label_classification"}
    assert len(set(onnx_answers(file, inputs)[0])) == 1
    assert len(set(probabilities_of(model, TEXTS).argmax(1))) == 2, "the texts must tell the labels apart"


def test_pairs_to_compare_on_stay_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tother\tlabel\nx\ty\tb\n")
    file, options = str(tmp_path / "a.tsv"), ReadOptions(pair="other")
    texts, labels = read_checks([file], options, SingleLabel(["a", "b"]), takes_pairs=True, has_label_column=False)["a"]
    assert (texts, labels) == ((["x"], ["y"]), [1])


def test_onnx_in_8_bits_is_near_and_says_what_it_was_compared_on(model: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("onnxruntime_extensions")
    rows = "".join(f"film number {n} was fine\t{'ab'[n % 2]}\n" for n in range(40))
    (tmp_path / "rows.tsv").write_text(f"text\tlabel\n{rows}")
    (tmp_path / "lines.txt").write_text("fine\n")
    options = ["--check-file", tmp_path / "rows.tsv", tmp_path / "lines.txt", "--most-changed", 100, "--most-lost", 100]
    run_export("--model", model, "--format", "onnx-int8", "--output", tmp_path / "x.onnx", *options)
    said = capsys.readouterr().out
    table = said.splitlines()
    assert table[0].startswith("file ") and "labels changed  largest change" in table[0]
    assert [line.split()[0] for line in table[1:4]] == ["rows", "lines", "all"]
    assert "no labels in lines: accuracy was not compared" in said
    assert said.count("not compared") == 1
    _, probabilities, _ = onnx_answers(tmp_path / "x.onnx", {"text": TEXTS})
    expected = probabilities_of(model, TEXTS)
    assert np.abs(probabilities - expected).mean() < 0.3 * expected.std(0).mean()


def test_a_folder_for_onnx_clients(model: Path, tmp_path: Path) -> None:
    """From ids, padded, to logits, in plain ONNX; beside what transformers reads, without weights of torch."""
    onnxruntime = pytest.importorskip("onnxruntime")
    (tmp_path / "rows.txt").write_text("A fine film.\nno\n")
    bounds = ["--check-file", tmp_path / "rows.txt", "--most-changed", 100]
    beside = {file.name for file in model.iterdir()} - {"model.safetensors"}
    texts = [text for text in TEXTS if text][:6]
    expected, task = probabilities_of(model, texts), load_classifier(model, CPU, bf16=False)[2]
    for kind, file, options in (("onnx-hf", "model.onnx", []), ("onnx-hf-int8", "model_quantized.onnx", bounds)):
        run_export("--model", model, "--format", kind, "--output", tmp_path / kind, *options)
        files = {str(file.relative_to(tmp_path / kind)) for file in (tmp_path / kind).rglob("*") if file.is_file()}
        assert files == {*beside, f"onnx/{file}"}
        session = onnxruntime.InferenceSession(str(tmp_path / kind / "onnx" / file))
        assert [output.name for output in session.get_outputs()] == ["logits"]
        (logits,) = session.run(None, padded_ids(model, texts))
        found = task.probabilities(torch.from_numpy(logits)).numpy()
        assert np.abs(found - expected).max() < (1e-5 if kind == "onnx-hf" else 0.2)


@needs_torchtext
def test_torchscript_answers_alike_without_this_package(model: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "new" / "classifier.pt"
    run_export("--model", model, "--format", "torchscript", "--output", file)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "same answers on 30 rows" in said
    assert [file.name for file in file.parent.iterdir()] == ["classifier.pt"]
    labels, probabilities, names = answers_alone(TORCHSCRIPT_ALONE, "sst2_xlmr train transformers", file, TEXTS)
    expected = probabilities_of(model, TEXTS)
    assert np.abs(probabilities - expected).max() < 1e-5
    assert labels == [names[index] for index in expected.argmax(-1)]
    assert set(labels) == {"a", "b"}


def test_a_trimmed_model_gives_the_same_answers(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """To the bit on the texts it was trimmed for; other texts still get an answer, and no character becomes unknown."""
    texts, model = ["A fine film.", "no", "It was slow, and long"], Path(shutil.copytree(model, tmp_path / "model"))
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    (model / "README.md").write_text("what it is")
    options = ["--format", "hf", "--keep-vocabulary-of", tmp_path / "texts.txt"]
    run_export("--model", model, *options, "--output", tmp_path / "t")
    said = capsys.readouterr().out
    before, after = find_encoder(str(model)), find_encoder(str(tmp_path / "t"))
    assert after.shape.vocab_size < before.shape.vocab_size
    sizes = f"{after.shape.vocab_size:,} of {before.shape.vocab_size:,}"
    assert f"kept {sizes} embedding rows: 3 texts" in said
    assert (tmp_path / "t" / "README.md").read_text().endswith(f"trimmed: {sizes} pieces are left.\n")
    assert np.array_equal(probabilities_of(model, texts), probabilities_of(tmp_path / "t", texts))
    old, new = (SentencePieceProcessor(model_file=str(e.tokenizer_file)) for e in (before, after))
    for text in (*texts, "zebra quiz", "Кино 映画", "long words unheard of"):
        unknown = [pieces.EncodeAsIds(text).count(pieces.unk_id()) for pieces in (old, new)]
        assert unknown[0] == unknown[1], text
    assert probabilities_of(tmp_path / "t", ["zebra quiz"]).shape == (1, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "t", "texts.txt"]


def test_trimming_goes_together_with_other_forms(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_extensions")
    (tmp_path / "texts.csv").write_text('text\n"A fine film, really"\nIt was slow\n')
    for name, words in (("small", ["--keep-vocabulary-of", tmp_path / "texts.csv"]), ("whole", [])):
        run_export("--model", model, "--format", "onnx", "--output", tmp_path / f"{name}.onnx", *words)
    assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / "whole.onnx").stat().st_size
    texts = ["A fine film, really", "It was slow"]
    found = onnx_answers(tmp_path / "small.onnx", {"text": texts})[1]
    assert np.abs(found - probabilities_of(model, texts)).max() < 1e-5


def test_characters_that_only_longer_pieces_have_keep_these(model: Path, tmp_path: Path) -> None:
    """Take a letter's own piece away; the pieces that have it are then the only ones that know it."""
    file = model / TOKENIZER_NAME
    pieces = SentencePieceProcessor(model_file=str(file))
    names = [pieces.IdToPiece(number) for number in range(pieces.GetPieceSize())]
    letters = [name for name in names[3:] if len(name) == 1 and name.isalpha()]
    letter = next(one for one in letters if sum(one in name for name in names) > 2)
    kept = np.array([number for number, name in enumerate(names) if name.lstrip("▁") != letter])
    (tmp_path / "fewer.model").write_bytes(trimmed_tokenizer(file.read_bytes(), kept))
    tokenizer = Tokenizer(tmp_path / "fewer.model", 64)
    fewer = tokenizer.pieces
    assert fewer.GetPieceSize() == len(kept)
    needed = {fewer.IdToPiece(number) for number in needed_pieces(tokenizer, []).tolist()}
    assert {name for name in names if letter in name and name.lstrip("▁") != letter} <= needed
