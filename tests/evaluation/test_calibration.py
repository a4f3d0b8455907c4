"""Temperature scaling: the fit, the folded head, what train.py reports, what predict.py leaves open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLE_DATA, Capture, Patch, RunTrain, metrics, refusal
from running import digests, resume
from safetensors.torch import load_file

import sst2_xlmr
from sst2_xlmr.evaluation import calibration
from sst2_xlmr.evaluation.calibration import HIGHEST, LOWEST, calibrate, describe_calibration
from sst2_xlmr.programs import evaluate, predict
from sst2_xlmr.task import SingleLabel

TEXTS = ["A fine film.", "Not my cup of tea.", "", "word " * 30, "It was  slow"]
TWO = SingleLabel(["no", "yes"])


def drawn(temperature: float, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from probabilities, and what a model says whose logits are `temperature` times too large."""
    random = np.random.RandomState(0)
    logits = random.normal(0, 1.5, (20_000, classes))
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (true.cumsum(1) < random.random_sample((len(true), 1))).sum(1)
    said = np.exp(logits * temperature)
    return (said / said.sum(1, keepdims=True)).astype(np.float32), labels


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    powers = probabilities ** (1 / temperature)
    return powers / powers.sum(1, keepdims=True)


@pytest.fixture
def any_gain(monkeypatch: Patch) -> None:
    """For models of this test's size, which no temperature makes significantly better."""
    monkeypatch.setattr(calibration, "_SIGNIFICANT_GAIN", 0.0)


@pytest.mark.parametrize(("temperature", "classes"), [(0.5, 2), (1.0, 2), (3.0, 5)])
def test_the_temperature_is_found(temperature: float, classes: int) -> None:
    probabilities, labels = drawn(temperature, classes)
    task = SingleLabel([f"class {number}" for number in range(classes)])
    found, before, after = calibrate(task, probabilities, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    assert after < 0.01
    assert before > 0.05 or temperature == 1.0
    assert (tempered(probabilities, found).argmax(1) == probabilities.argmax(1)).all()


def test_rows_that_say_nothing_do_not_make_it_extreme(any_gain: None) -> None:
    sure = np.array([[1 - 1e-6, 1e-6], [1e-6, 1 - 1e-6]], np.float32)
    assert calibrate(TWO, sure, np.array([0, 1]))[0] == pytest.approx(LOWEST, rel=0.01)
    assert calibrate(TWO, sure, np.array([1, 0]))[0] == pytest.approx(HIGHEST, rel=0.01)


def test_it_stays_at_1_if_rows_cannot_tell() -> None:
    """Of twelve draws of rows from a calibrated model, one may show another temperature by chance."""
    probabilities, labels = drawn(1.0, 2)
    parts = [slice(start, start + 200) for start in range(0, 2_400, 200)]
    fitted = [calibrate(TWO, probabilities[part], labels[part]) for part in parts]
    unchanged = [(before, after) for temperature, before, after in fitted if temperature == 1]
    assert len(unchanged) >= 10
    assert all(before == after for before, after in unchanged)
    assert "temperature 1, as no other" in describe_calibration(1, *unchanged[0])


def probabilities_of(model: Path) -> np.ndarray:
    return sst2_xlmr.load(model, precision="fp32", device="cpu").probabilities(TEXTS)


def test_train_writes_calibrated_models(any_gain: None, run_train: RunTrain, tmp_path: Path, capsys: Capture) -> None:
    options = ["--epochs", 3, "--precision", "bf16"]
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
    whole = digests(run)
    shutil.rmtree(run / "model")
    resume(run)
    assert digests(run) == whole


def test_what_is_reported_is_measured_on_what_is_written(
    any_gain: None, run_train: RunTrain, small_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    """In metrics.jsonl, the table at the end and the cards; of best/, another step's model, on the test files too."""
    options = ["--epochs", 4, "--lr", 3e-3, "--eval-every", 3, "--calibrate"]
    options += ["--test-file", SAMPLE_DATA / "test.de.tsv"]
    run = run_train(tmp_path / "run", *options)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    evaluations = [line for line in metrics(run) if "split" in line]
    dev = [line for line in evaluations if line["split"] == "dev"]
    best = max(dev, key=lambda line: line["accuracy"])
    assert best is not dev[-1], "this run is to have two models"
    files = {"dev": small_data / "dev.tsv", "test.de": SAMPLE_DATA / "test.de.tsv"}
    of_splits = {line["split"]: line for line in evaluations if line["split"] != "dev"}
    found = [("best", "dev", best), ("model", "dev", dev[-1])]
    found += [("best", "test.de", of_splits["best/test.de"]), ("model", "test.de", of_splits["test.de"])]
    for folder, split, reported in found:
        measured = measure(run / folder, files[split], tmp_path / "numbers.json")
        assert {key: reported[key] for key in measured} == pytest.approx(measured, abs=1e-5), (folder, split)
        assert measured["ece"] != pytest.approx(0, abs=1e-4)
    for row, line in of_splits.items():
        assert any(words[:1] == [row] and f"{line['ece']:.4f}" in words for words in table), row
    for folder, line in (("best", best), ("model", dev[-1])):
        card = (run / folder / "README.md").read_text()
        assert f"{line['ece']:.4f}" in card, folder
    assert card.count("| test.de |") == 1, "best's figures are not the last model's"
    assert not any(words[:1] == ["mean"] for words in table), "of two models"


def measure(model: Path, file: Path, scratch: Path) -> dict[str, float]:
    options = ["--precision", "fp32", "--device", "cpu", "--json", scratch, "--overwrite"]
    evaluate.main([str(word) for word in ("--model", model, "--file", f"x={file}", *options)])
    found = json.loads(scratch.read_text())["files"]["x"]
    return {key: found[key] for key in ("loss", "accuracy", "macro_f1", "ece")}


def test_predict_abstains(model: Path, tmp_path: Path, capsys: Capture) -> None:
    highest = probabilities_of(model).max(1)
    limit = float(np.sort(highest)[2]) - 1e-6
    options = ["--model", str(model), "--device", "cpu", "--precision", "fp32"]
    predict.main([*options, "--abstain-below", str(limit), *TEXTS])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] == "?" for row in rows] == (highest < limit).tolist()
    assert sum(row[0] == "?" for row in rows) == 2
    assert "'1.5' is not a probability" in refusal(predict.main, [*options, "--abstain-below", "1.5", "x"])
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta\n")
    words = ["--input", str(tmp_path / "test.tsv"), "--glue-submission", str(tmp_path / "g"), "--abstain-below", "0.9"]
    assert "needs a label per row" in refusal(predict.main, [*options, *words])
    assert not (tmp_path / "g").exists()
