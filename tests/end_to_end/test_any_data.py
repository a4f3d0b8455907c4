"""From files of any kind to predictions, with the real train.py and scripts/predict.py."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Capture, losses, metrics, torchrun, train_options, user_error
from safetensors.torch import load_file

from sst2_xlmr import train
from sst2_xlmr.util import versions

sys.path.insert(0, str(ROOT / "scripts"))

from sst2_xlmr.programs import predict
from sst2_xlmr.util.errors import UserError

WORDS = {"good": ["fine", "great", "funny"], "bad": ["boring", "awful", "thin"], "so, so": ["plot", "film", "story"]}
LEARN = ["--epochs", 12, "--lr", 3e-3, "--warmup-ratio", 0.1]


def write_csv(file: Path, rows: int, seed: int) -> None:
    """Rows of three classes, told by their words; quoted text with commas, quotation marks and line ends."""
    generator = random.Random(seed)
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["id", "verdict", "review"])
        for number in range(rows):
            verdict = list(WORDS)[number % 3]
            words = generator.choices(WORDS[verdict], k=6)
            writer.writerow([number, verdict, f'"{words[0]}, {words[1]}"\n' + " ".join(words[2:])])


def write_pairs(file: Path, rows: int, seed: int) -> None:
    """Rows whose class only the second text tells."""
    generator = random.Random(seed)
    with gzip.open(file, "wt", encoding="utf-8") as opened:
        for number in range(rows):
            second = generator.choices(list(WORDS.values())[number % 3], k=6)
            first = generator.choices([word for words in WORDS.values() for word in words], k=6)
            row = {"premise": " ".join(first), "hypothesis": " ".join(second), "label": number % 3, "idx": number}
            opened.write(json.dumps(row) + "\n")


def accuracy_of_predictions(model: Path, file: Path, output: Path, truth: str, *options: str) -> float:
    """Predict a file's rows, and return the share of rows whose label is the true one."""
    predict.main(["--model", str(model), "--device", "cpu", "--input", str(file), "--output", str(output), *options])
    with gzip.open(output, "rt", encoding="utf-8", newline="") as opened:
        rows: list[dict[str, Any]] = list(csv.DictReader(opened))
    name = "predicted_label" if truth == "label" else "label"
    assert sum(abs(float(row["probability"]) - 0.5) for row in rows) > 0
    return sum(row[name] == row[truth] for row in rows) / len(rows)


def check_evaluate_and_export(model: Path, file: Path, expected: float, scratch: Path, *options: str) -> None:
    """The scripts find the same accuracy; the TorchScript file, where there can be one, gives the right labels."""
    numbers, classify = scratch / "numbers.json", scratch / "classifier.pt"
    common = ["--model", str(model)]
    steps = [("evaluate.py", ["--file", f"test={file}", "--json", str(numbers), "--device", "cpu", *options])]
    if versions.has_torchtext():
        steps.append(("export.py", ["--format", "torchscript", "--output", str(classify)]))
    for script, words in steps:
        command = [sys.executable, f"scripts/{script}", *common, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), script
    assert json.loads(numbers.read_text())["files"]["test"]["accuracy"] == pytest.approx(expected)
    if not versions.has_torchtext():
        return
    importlib.import_module("torchtext")  # which owns an operator of the file
    texts = [" ".join(words) for words in WORDS.values()]
    labels, _ = torch.jit.load(classify)(texts, texts) if len(options) > 2 else torch.jit.load(classify)(texts)
    names = json.loads((model / "config.json").read_text())["id2label"].values()
    assert sorted(labels) == sorted(names), "each class's own words"


def test_csv_with_words_as_labels_and_quoted_text(tiny_encoder: Path, tmp_path: Path) -> None:
    for split, rows in (("train", 120), ("dev", 30), ("test", 60)):
        write_csv(tmp_path / f"{split}.csv", rows, seed=rows)
    options = ["--text-column", "review", "--label-column", 2, *LEARN]
    train.main(train_options(tiny_encoder, tmp_path, tmp_path / "run", *options))
    names = ["bad", "good", "so, so"]
    settings = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert list(settings["id2label"].values()) == names
    (final,) = [line for line in metrics(tmp_path / "run") if line.get("split") == "test"]
    assert final["rows"] == 60
    assert final["accuracy"] > 0.9
    model, output = tmp_path / "run" / "model", tmp_path / "out.csv.gz"
    found = accuracy_of_predictions(model, tmp_path / "test.csv", output, "verdict", "--text-column", "review")
    assert found == pytest.approx(final["accuracy"])
    check_evaluate_and_export(
        model, tmp_path / "test.csv", found, tmp_path, "--text-column=review", "--label-column=verdict"
    )


def test_gzipped_jsonl_with_pairs(tiny_encoder: Path, tmp_path: Path) -> None:
    for split, rows in (("train", 120), ("dev", 30), ("test", 60)):
        write_pairs(tmp_path / f"{split}.jsonl.gz", rows, seed=rows)
    columns = ["--text-column", "premise", "--text-pair-column", "hypothesis"]
    train.main(train_options(tiny_encoder, tmp_path, tmp_path / "run", *columns, *LEARN))
    assert list(json.loads((tmp_path / "run/model/config.json").read_text())["id2label"].values()) == ["0", "1", "2"]
    (final,) = [line for line in metrics(tmp_path / "run") if line.get("split") == "test"]
    assert final["accuracy"] > 0.9
    model, file = tmp_path / "run" / "model", tmp_path / "test.jsonl.gz"
    assert accuracy_of_predictions(model, file, tmp_path / "out.csv.gz", "label", *columns) == pytest.approx(
        final["accuracy"]
    )
    check_evaluate_and_export(model, file, final["accuracy"], tmp_path, *columns)
    with pytest.raises(UserError, match="was trained on pairs of texts"):
        accuracy_of_predictions(model, file, tmp_path / "first.csv.gz", "label", "--text-column", "premise")


def test_class_weights_of_one_change_nothing(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    for name, options in (("plain", []), ("ones", ["--class-weights", "1,1"]), ("twos", ["--class-weights", "2,2"])):
        train.main(train_options(tiny_encoder, small_data, tmp_path / name, "--epochs", 1, *options))
    assert losses(tmp_path / "ones") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert losses(tmp_path / "twos")[0] == pytest.approx(2 * losses(tmp_path / "plain")[0], rel=1e-6)


@pytest.mark.parametrize("weights", ["balanced", "0.2,3"])
def test_class_weights_do_not_depend_on_the_processes(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, weights: str
) -> None:
    lines = (small_data / "train.tsv").read_text(encoding="utf-8").splitlines()
    kept = [line for number, line in enumerate(lines) if line.endswith("0") or number % 3 == 0]
    (small_data / "train.tsv").write_text("\n".join(kept) + "\n", encoding="utf-8")
    options = ["--class-weights", weights, "--epochs", 1, "--micro-batch-size", 2, "--label-smoothing", 0.1]
    options += ["--dropout", 0, "--head-dropout", 0]
    train.main(train_options(tiny_encoder, small_data, tmp_path / "one", *options))
    done = torchrun(2, train_options(tiny_encoder, small_data, tmp_path / "two", *options))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    ours, theirs = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("two", "one"))
    for name, tensor in ours.items():
        assert float((tensor - theirs[name]).abs().max()) < 1e-5, name


def test_check_says_how_files_are_read_and_replaces_its_own_report_only(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    report = tmp_path / "report.json"
    words = train_options(tiny_encoder, small_data, tmp_path / "run")
    for _ in range(2):
        train.main([*words, "--check", str(report)])
    found = json.loads(report.read_text(encoding="utf-8"))
    assert {name: split["rows"] for name, split in found.items()} == {"train": 50, "dev": 20}
    train_file = small_data / "train.tsv"
    before = train_file.read_bytes()
    says = user_error(lambda: train.main([*words, "--check", str(train_file)]), capsys)
    assert f"--check {train_file} already exists, and is no report of --check; name another file" in says
    assert train_file.read_bytes() == before
    assert not (tmp_path / "run").exists()
