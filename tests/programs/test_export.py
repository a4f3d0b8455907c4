"""What training and scripts/export.py write: the folder with its card, and the TorchScript file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics, needs_small_encoder, sst2_sentences, user_error
from reference import needs_torchtext
from safetensors.torch import load_file, save_file

from sst2_xlmr import train
from sst2_xlmr.config import Config
from sst2_xlmr.evaluation.calibration import Calibration
from sst2_xlmr.evaluation.evaluate import Evaluation, predict
from sst2_xlmr.export.folder import LAST_LAYER
from sst2_xlmr.export.model_card import card_text
from sst2_xlmr.model.classifier import load_classifier
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.programs import evaluate, export
from sst2_xlmr.util import versions
from sst2_xlmr.util.errors import UserError

# torch ignores it by itself, pytest does not: torch.nn.functional looks at a size that never changes.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

CPU = torch.device("cpu")
TEXTS = ["A fine film.", "", "word " * 300, "  It was  slow,\tand long ", "Кино 映画 ταινία", "no"] * 12

# Runs where sst2_xlmr cannot be imported: argv is the file, a JSON list of texts, and where the answers go.
USE_ALONE = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sst2_xlmr", "train", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch, torchtext
classify = torch.jit.load(sys.argv[1])
labels, probabilities = classify(json.load(open(sys.argv[2])))
assert classify([])[0] == [] and classify([])[1].shape == (0, len(classify.label_names))
json.dump([labels, probabilities.tolist(), classify.label_names], open(sys.argv[3], "w"))
"""


def run_export(*options: object) -> None:
    export.main([str(option) for option in options])


def probabilities_of(model: Path, texts: list[str]) -> torch.Tensor:
    classifier, tokenizer, _ = load_classifier(model, CPU, bf16=False)
    return predict(classifier, tokenizer(texts), 256, CPU)


@needs_torchtext
def test_torchscript_answers_alike_without_this_package(model: Path, tmp_path: Path) -> None:
    options = ["--model", model, "--format", "torchscript", "--output", tmp_path / "new" / "classifier.pt"]
    command: list[object] = [sys.executable, ROOT / "scripts" / "export.py", *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert "same answers on 30 rows" in done.stdout
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["classifier.pt"]

    labels = check_alone(model, tmp_path / "new" / "classifier.pt", TEXTS, tmp_path)
    assert len(set(labels)) == 2, "the texts must tell the labels apart"


def check_alone(model: Path, file: Path, texts: list[str], scratch: Path) -> list[str]:
    """Check the file's answers in a process that has no other package of ours; returns its labels."""
    (scratch / "texts").write_text(json.dumps(texts))
    words = [sys.executable, "-W", "ignore", "-c", USE_ALONE, str(file), "texts", "answers"]
    env = {**os.environ, "PYTHONPATH": ""}
    alone = subprocess.run(words, cwd=scratch, env=env, capture_output=True, check=False)
    assert (alone.returncode, alone.stderr) == (0, b"")
    labels, probabilities, label_names = json.loads((scratch / "answers").read_text())
    expected = probabilities_of(model, texts)
    torch.testing.assert_close(torch.tensor(probabilities), expected, atol=1e-5, rtol=0)
    assert labels == [label_names[index] for index in expected.argmax(-1).tolist()]
    return labels


@needs_torchtext
@pytest.mark.slow
@needs_small_encoder
def test_torchscript_on_sst2(trained_small_model: Path, tmp_path: Path) -> None:
    run_export("--model", trained_small_model, "--format", "torchscript", "--output", tmp_path / "classifier.pt")
    labels = check_alone(trained_small_model, tmp_path / "classifier.pt", sst2_sentences(), tmp_path)
    assert set(labels) == {"negative", "positive"}


@needs_torchtext
def test_torchscript_cuts_long_texts_at_the_models_length(model: Path, tmp_path: Path) -> None:
    from sst2_xlmr.export.torchscript import save_torchscript

    classifier, tokenizer, names = load_classifier(model, CPU, bf16=False)
    tokenizer.max_length = 8
    save_torchscript(classifier, tokenizer, names, tmp_path / "x.pt")
    loaded = torch.jit.load(tmp_path / "x.pt")
    text = "one two three four five six seven eight nine ten"
    assert torch.equal(loaded([text])[1], loaded([text + " eleven"])[1])


@needs_torchtext
def test_torchscript_takes_pairs(model: Path, tmp_path: Path) -> None:
    from sst2_xlmr.export.torchscript import save_torchscript

    classifier, tokenizer, names = load_classifier(model, CPU, bf16=False)
    pairs = [f"{text} again" for text in reversed(TEXTS)]
    expected = predict(classifier, tokenizer(TEXTS, pairs), 256, CPU)
    save_torchscript(classifier, tokenizer, names, tmp_path / "x.pt")
    found = torch.jit.load(tmp_path / "x.pt")(TEXTS, pairs)
    torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=0)
    assert found[0] == [names[index] for index in expected.argmax(-1).tolist()]


def test_folder_is_rewritten_with_its_card(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))
    (source / "README.md").write_text("what it is")
    (tmp_path / "texts.txt").write_text("A fine film.\nEin guter Film.\n", encoding="utf-8")
    options = ["--check-file", tmp_path / "texts.txt", "--output", tmp_path / "copy"]
    run_export("--model", source, "--format", "hf", *options)
    assert "same answers on 2 rows, probabilities within 0" in capsys.readouterr().out
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == sorted(f.name for f in source.iterdir())
    assert (tmp_path / "copy" / "README.md").read_text() == "what it is"


def test_the_card_says_once_how_it_was_calibrated(model: Path, tmp_path: Path) -> None:
    """However often it is calibrated again; what training said stays."""
    plain = "What it is.\n\nThe probabilities are calibrated: by training.\n"
    source = Path(shutil.copytree(model, tmp_path / "source"))
    (source / "README.md").write_text(plain)
    for number, temperature in enumerate((1.5, 2.0)):
        evaluate.write_calibrated(source, tmp_path / f"{number}", Calibration(temperature, 0.2, 0.1))
        source = tmp_path / f"{number}"
    card = (source / "README.md").read_text()
    assert card.startswith(plain + "\nThe probabilities are calibrated: temperature 2.000")
    assert card.count("calibrated: temperature") == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (model, source))
    for name in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
        assert torch.allclose(after[name] * 3, before[name])
    assert before["classifier.dense.weight"].equal(after["classifier.dense.weight"])


@pytest.mark.parametrize(
    ("header", "options", "says"),
    [
        ("text\tlabel", ["--label-column", "kind"], "no column 'kind' among text, label"),
        ("text\tlabel\tlabel", ["--label-column", "label"], "two columns are named 'label'"),
        ("text\tkind", ["--most-lost", "1"], "--most-lost: no labels in rows; name their column with --label-column"),
    ],
)
def test_accuracy_is_not_left_out_where_it_was_asked_for(
    model: Path, tmp_path: Path, header: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime_extensions")
    (tmp_path / "rows.tsv").write_text(f"{header}\n" + "\t".join(["fine", "a", "a"][: header.count("\t") + 1]) + "\n")
    paths: list[object] = ["--check-file", tmp_path / "rows.tsv", "--output", tmp_path / "x"]
    assert says in user_error(lambda: run_export("--model", model, "--format", "onnx-int8", *paths, *options), capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.tsv"]


def test_accuracy_that_was_not_compared_is_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime_extensions")
    (tmp_path / "rows.tsv").write_text("text\tlabel\nfine\ta\n")
    (tmp_path / "lines.txt").write_text("fine\n")
    options = ["--check-file", tmp_path / "rows.tsv", tmp_path / "lines.txt", "--most-changed", 100, "--most-lost", 100]
    run_export("--model", model, "--format", "onnx-int8", "--output", tmp_path / "x", *options)
    said = capsys.readouterr().out
    assert "no labels in lines: accuracy was not compared" in said
    assert said.count("not compared") == 1


def test_folder_in_bf16(model: Path, tmp_path: Path) -> None:
    run_export("--model", model, "--format", "hf", "--dtype", "bf16", "--output", tmp_path / "copy")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--format", "hf"], 2e-5),
        (["--format", "hf", "--dtype", "bf16"], 0.1),
        (["--format", "onnx"], 2e-4),
        pytest.param(["--format", "torchscript"], 2e-5, marks=needs_torchtext),
    ],
)
def test_what_answers_otherwise_is_removed(
    model: Path,
    tmp_path: Path,
    options: list[str],
    error: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def spoil(written: Any) -> Any:
        def write(*given: Any) -> Any:
            classify = written(*given)
            return lambda *rows: classify(*rows) + torch.tensor([error, -error])

        return write

    if "onnx" in options:
        pytest.importorskip("onnxruntime_extensions")
    for name in ("write_hugging_face", "write_torchscript", "write_onnx_file"):
        monkeypatch.setattr(export, name, spoil(getattr(export, name)))
    output = tmp_path / "out" / "x"
    line = user_error(lambda: run_export("--model", model, "--output", output, *options), capsys)
    assert f"the written model disagrees with {model}: a probability differs by " in line
    assert not list(output.parent.iterdir())


def test_an_onnx_file_with_another_weight_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By so little that no label changes."""
    onnx_file = pytest.importorskip("sst2_xlmr.export.onnx")
    write_onnx = onnx_file.write_onnx

    def write_wrong(file: Path, weights: dict[str, Any], *more: Any) -> None:
        name = LAST_LAYER[1]
        write_onnx(file, {**weights, name: weights[name] + np.array([0.01, 0], np.float32)}, *more)

    monkeypatch.setattr(onnx_file, "write_onnx", write_wrong)
    options = ["--model", model, "--format", "onnx", "--output", tmp_path / "x"]
    assert "a probability differs by 0.00" in user_error(lambda: run_export(*options), capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(
    model: Path, tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no answer shows them: the embedding of a piece that the compared sentences do not have."""
    source, name = Path(shutil.copytree(model, tmp_path / "source")), "roberta.embeddings.word_embeddings.weight"
    weights = load_file(source / "model.safetensors")
    weights[name][-1, 3] = value
    save_file(weights, source / "model.safetensors")
    options = ["--model", source, "--format", "hf", "--output", tmp_path / "x"]
    line = user_error(lambda: run_export(*options), capsys)
    assert f"{source / 'model.safetensors'}: " in line
    assert "values that are not finite" in line


@pytest.mark.parametrize("gone", ["closed pipe", "/dev/full"])
def test_a_result_that_is_written_is_a_success_whoever_reads(model: Path, tmp_path: Path, gone: str) -> None:
    (tmp_path / "texts.txt").write_text("A fine film.\n")
    options: list[object] = ["--format", "hf", "--output", tmp_path / "x"]
    options += ["--keep-vocabulary-of", tmp_path / "texts.txt"]  # says a line before all is done, too
    command: list[object] = [sys.executable, ROOT / "scripts" / "export.py", "--model", model, *options]
    if gone == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(gone, os.O_WRONLY)
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert done.stderr.startswith("warning: cannot write to standard output: ")
    assert probabilities_of(tmp_path / "x", ["A fine film."]).shape == (1, 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--format", "gguf"], "invalid choice: 'gguf'"),
        (["--format", "hf", "--dtype", "fp16"], "invalid choice: 'fp16'"),
        (["--format", "torchscript", "--dtype", "bf16"], "--dtype bf16 is for --format hf"),
        (["--format", "hf", "--check-file", "no/such"], "cannot read no/such as UTF-8 text"),
        (["--format", "hf", "--check-file", "no.tsv"], "cannot read no.tsv: No such file"),
        (["--format", "hf", "--check-file", "empty"], "empty is empty"),
        (["--format", "hf", "--check-file", "a/empty", "empty"], "two files have the name empty"),
        (["--format", "hf", "--keep-vocabulary-of", "no.csv"], "cannot read no.csv: No such file"),
        (["--format", "hf", "--from-ids"], "--from-ids is for --format onnx"),
        (["--format", "hf-int8"], "invalid choice: 'hf-int8'"),
        (["--format", "hf", "--most-changed", "101"], "'101' is not a percentage from 0 to 100"),
        (["--format", "hf", "--most-changed", "5"], "are for --format onnx-int8"),
        (["--format", "hf", "--text-column", "x"], "--text-column needs a .tsv, .csv or .jsonl file"),
        (["--format", "hf", "--check-file", "empty", "--text-column", "x"], "--text-column needs a .tsv, .csv"),
        (["--format", "hf", "--output", "empty"], "--output empty already exists"),
        (["--format", "hf", "--output", "empty/x"], "cannot write empty/x: "),
        (["--format", "hf", "--model", "no/such"], "no/such: neither"),
        ([], "--format"),
    ],
)
def test_wrong_use(
    model: Path,
    tmp_path: Path,
    options: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    assert says in user_error(lambda: run_export("--model", model, "--output", "x", *options), capsys)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty"]


def test_an_encoder_without_head_and_a_runs_folder_are_refused(
    tiny_encoder: Path, run_train: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no classification head"):
        run_export("--model", tiny_encoder, "--format", "hf", "--output", tmp_path / "x")
    run = run_train(tmp_path / "run", "--max-steps", 1)
    with pytest.raises(UserError, match="is the folder of a run; give the model in it, .*run/model"):
        find_encoder(str(run))
    with pytest.raises(UserError, match="step-00000001 is a checkpoint, .*; give best or model in the run's folder"):
        find_encoder(str(run / "checkpoints" / "step-00000001"))


def test_torchscript_is_refused_without_torchtext(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "has_torchtext", lambda: False)
    options = ["--model", str(model), "--format", "torchscript", "--output", str(tmp_path / "x.pt")]
    line = user_error(lambda: export.main(options), capsys)
    assert "--format torchscript needs torchtext under torch 2.3.1, and this is torch" in line


def test_training_writes_a_card_without_paths(
    run_train: Callable[..., Path], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each folder's with the metrics of its own weights: here the first evaluation is the best of two."""
    evaluate_all, accuracies = train.evaluate, iter([0.9, 0.5, 0.6])

    def first_is_best(*arguments: Any) -> Evaluation:
        evaluation = evaluate_all(*arguments)
        return dataclasses.replace(evaluation, metrics={**evaluation.metrics, "accuracy": next(accuracies)})

    monkeypatch.setattr(train, "evaluate", first_is_best)
    shutil.copy(small_data / "dev.tsv", small_data / "other.tsv")
    options = ["--epochs", 2, "--eval-every", 7, "--test-file", small_data / "other.tsv"]
    run = run_train(tmp_path / "run", *options)
    cards = {name: (run / name / "README.md").read_text(encoding="utf-8") for name in ("best", "model")}
    rows = {}
    for entry in [entry for entry in metrics(run) if "split" in entry]:
        numbers = (f"{entry[key]:.4f}" for key in ("accuracy", "macro_f1", "loss"))
        rows[entry["step"], entry["split"]] = f"| {entry['split']} | 20 | {' | '.join(numbers)} |\n"
    head = "| file | rows | accuracy | macro F1 | loss |\n| --- | --- | --- | --- | --- |\n"
    assert f"{head}{rows[7, 'dev']}\nThese weights were chosen by their accuracy on dev, " in cards["best"]
    assert f"{head}{rows[14, 'dev']}{rows[14, 'other']}\n## Settings" in cards["model"]
    for text in (
        "tiny, fine-tuned with sst2_xlmr for 14 steps",
        "50 rows train, 20 rows dev, 20 rows other; from data, other.tsv.",
        "| `--lr` | 0.001 |",
        "| `--freeze-encoder` | off |",
        versions.versions(),
    ):
        assert text in cards["model"]
    for card in cards.values():
        assert card.startswith("---\nlibrary_name: transformers\n")
        assert str(tmp_path) not in card
        assert "/" not in card.split("## Data")[1]


def test_card_of_a_bundle_names_its_hub_repository_and_shortens_many_classes() -> None:
    card = card_text(Config(text_column="a|b", label_names=[f"c{n}" for n in range(50)]), {"train": 5}, [], 3)
    assert "base_model: FacebookAI/xlm-roberta-base\ntags: " in card
    assert "# Text classifier: 50 classes\n" in card
    assert "5 rows train; from SST-2 of the GLUE benchmark." in card
    assert "| `--text-column` | a\\|b |" in card
    config = Config(
        data_dir="/data/films", eval_file=["fr=/data/fr.tsv"], test_file=["/data/de.tsv"], label_names=["a", "b"]
    )
    card = card_text(config, {"train": 5, "fr": 2, "de": 2}, [], 3, Calibration(1.5, 0.25, 0.125))
    assert "; from films, fr.tsv, de.tsv." in card
    assert "a temperature of 1.500, fitted on dev" in card
    assert "from 0.2500 to 0.1250. Losses above are without it.\n\n## Settings" in card
    card = card_text(config, {"train": 5}, [], 3, Calibration(1.0, 0.25, 0.25))
    assert "calibrated: temperature 1, as no other is significantly better on dev;" in card


def test_a_model_that_is_exported_again_keeps_its_settings(run_train: Callable[..., Path], tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--dropout", 0.25, "--head-dropout", 0.5, "--max-steps", 1)
    run_export("--model", run / "model", "--format", "hf", "--output", tmp_path / "again")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (run / "model", tmp_path / "again"))
    assert after == before
