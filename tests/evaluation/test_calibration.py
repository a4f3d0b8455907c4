"""Temperature scaling: the fit, the folded head, train.py, evaluate.py, predict.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, user_error
from reference import needs_torchtext
from running import digests
from safetensors.torch import load_file

from sst2_xlmr import train
from sst2_xlmr.evaluation import calibration
from sst2_xlmr.evaluation.calibration import HIGHEST, LOWEST, calibrate, tempered
from sst2_xlmr.evaluation.evaluate import predict
from sst2_xlmr.model.classifier import load_classifier
from sst2_xlmr.programs import export as export_script
from sst2_xlmr.programs import predict as predict_script

sys.path.insert(0, str(ROOT / "scripts"))
RunTrain = Callable[..., Path]
CPU = torch.device("cpu")
TEXTS = ["A fine film.", "Not my cup of tea.", "", "word " * 30, "It was  slow"]


def drawn(temperature: float, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from probabilities, and what a model says whose logits are `temperature` times too large."""
    random = np.random.RandomState(0)
    logits = random.normal(0, 1.5, (20_000, classes))
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (true.cumsum(1) < random.random_sample((len(true), 1))).sum(1)
    said = np.exp(logits * temperature)
    return (said / said.sum(1, keepdims=True)).astype(np.float32), labels


@pytest.fixture
def any_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """For models of this test's size, which no temperature makes significantly better."""
    monkeypatch.setattr(calibration, "_SIGNIFICANT_GAIN", 0.0)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(temperature: float, classes: int) -> None:
    probabilities, labels = drawn(temperature, classes)
    fitted = calibrate(probabilities, labels)
    assert fitted.temperature == pytest.approx(temperature, rel=0.05)
    assert fitted.ece_after < 0.01
    assert fitted.ece_before > 0.05 or temperature == 1.0
    assert (tempered(probabilities, fitted.temperature).argmax(1) == probabilities.argmax(1)).all()


def test_rows_that_say_nothing_do_not_make_it_extreme(any_gain: None) -> None:
    sure = np.array([[1 - 1e-6, 1e-6], [1e-6, 1 - 1e-6]], np.float32)
    assert calibrate(sure, np.array([0, 1])).temperature == pytest.approx(LOWEST, rel=0.01)
    assert calibrate(sure, np.array([1, 0])).temperature == pytest.approx(HIGHEST, rel=0.01)


def test_it_stays_at_1_if_rows_cannot_tell() -> None:
    """Of a hundred draws of rows from a calibrated model, about five show another temperature by chance."""
    probabilities, labels = drawn(1.0, 2)
    fitted = [
        calibrate(probabilities[start : start + 200], labels[start : start + 200]) for start in range(0, 20_000, 200)
    ]
    assert sum(one.temperature == 1 for one in fitted) >= 90
    assert all(one.ece_after == one.ece_before for one in fitted if one.temperature == 1)
    assert "temperature 1, as no other" in str(next(one for one in fitted if one.temperature == 1))


def probabilities_of(model: Path, texts: list[str] = TEXTS) -> np.ndarray:
    classifier, tokenizer, _ = load_classifier(model, CPU, bf16=False)
    return predict(classifier, tokenizer(texts), 256, CPU).numpy()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_writes_calibrated_models(
    any_gain: None, run_train: RunTrain, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--epochs", 3, "--precision", precision]
    plain = run_train(tmp_path / "plain", *options)
    capsys.readouterr()
    run = run_train(tmp_path / "run", *options, "--calibrate")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("calibrated ")]
    temperature = float(line.split("temperature ")[1].split(",")[0])
    before, after = probabilities_of(plain / "model"), probabilities_of(run / "model")
    np.testing.assert_allclose(after, tempered(before, temperature), atol=2e-3)
    assert (before.argmax(1) == after.argmax(1)).all()
    card = (run / "model" / "README.md").read_text()
    assert f"divided by a temperature of {temperature:.3f}, fitted on dev" in " ".join(card.split())
    assert "temperature" not in (plain / "model" / "README.md").read_text()
    weights, others = (load_file(folder / "model" / "model.safetensors") for folder in (run, plain))
    changed = {name for name in weights if not weights[name].equal(others[name])}
    assert changed == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
    assert "chosen by their accuracy on dev" in (run / "best" / "README.md").read_text()
    assert "chosen by their accuracy on dev" not in card


def test_a_resumed_run_has_the_same_temperature(any_gain: None, run_train: RunTrain, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--epochs", 2, "--calibrate")
    whole = digests(run)
    shutil.rmtree(run / "model")
    train.main(["--resume", "--output-dir", str(run)])
    assert digests(run) == whole


@needs_torchtext
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_exported_files_are_calibrated_too(any_gain: None, run_train: RunTrain, tmp_path: Path) -> None:
    """export.py compares them with the model; transformers' side is in tests/end_to_end/test_transformers.py."""
    model = run_train(tmp_path / "run", "--epochs", 2, "--calibrate") / "model"
    options = ["--model", str(model), "--format", "torchscript", "--output", str(tmp_path / "x.pt")]
    export_script.main(options)
    _, probabilities = torch.jit.load(tmp_path / "x.pt")(TEXTS)
    np.testing.assert_allclose(probabilities.numpy(), probabilities_of(model), atol=1e-5)


def evaluate(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_evaluate_calibrates_a_model_that_is_there(run_train: RunTrain, small_data: Path, tmp_path: Path) -> None:
    model, dev, new = run_train(tmp_path / "run", "--epochs", 2) / "model", small_data / "dev.tsv", tmp_path / "new/m"
    done = evaluate("--model", model, "--device", "cpu", "--calibrate", dev, "--output", new)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{new}: temperature ")
    temperature = float(done.stdout.split("temperature ")[1].split(",")[0])
    np.testing.assert_allclose(probabilities_of(new), tempered(probabilities_of(model), temperature), atol=1e-3)
    assert ("The probabilities are calibrated" in (new / "README.md").read_text()) == (temperature != 1)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, new))
    assert before == after
    for words, says in (
        (["--calibrate", dev], "--calibrate FILE and --output DIR belong together"),
        (["--calibrate", dev, "--output", new], "already exists"),
        (["--calibrate", dev, "--output", tmp_path / "x", "--file", dev], "either --file"),
        (
            ["--calibrate", dev, "--output", tmp_path / "x", "--json", "y"],
            "--json, --tensorboard and --against are for --file",
        ),
        ([], "either --file"),
    ):
        refused = evaluate("--model", model, *words)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert says in refused.stderr


def test_predict_abstains(run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = run_train(tmp_path / "run", "--epochs", 1) / "model"
    limit = float(np.sort(probabilities_of(model).max(1))[2])
    capsys.readouterr()
    options = ["--model", str(model), "--device", "cpu", "--precision", "fp32"]
    predict_script.main([*options, "--abstain-below", str(limit - 1e-6), *TEXTS])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] == "?" for row in rows] == [bool(p < limit - 1e-6) for p in probabilities_of(model).max(1)]
    assert sum(row[0] == "?" for row in rows) == 2
    line = user_error(lambda: predict_script.main([*options, "--abstain-below", "1.5", "x"]), capsys)
    assert "'1.5' is not a probability" in line
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta\n")
    words = ["--input", str(tmp_path / "test.tsv"), "--glue-submission", str(tmp_path / "g"), "--abstain-below", "0.9"]
    assert "takes a label for every row" in user_error(lambda: predict_script.main([*options, *words]), capsys)
    assert not os.path.lexists(tmp_path / "g")
