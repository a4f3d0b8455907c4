"""From files of any kind to predictions, with all programs."""

import csv
import gzip
import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Words, metrics, refusal, train_options, user_error

from sst2_xlmr import train
from sst2_xlmr.programs import evaluate, export, predict
from sst2_xlmr.util import versions

WORDS = {"good": ["fine", "great", "funny"], "bad": ["boring", "awful", "thin"], "so, so": ["plot", "film", "story"]}


def write_csv(file: Path, rows: int) -> None:
    """Rows of three classes, told by their words; quoted text with commas, quotation marks and line ends."""
    generator = random.Random(rows)
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["id", "verdict", "review"])
        for number in range(rows):
            verdict = list(WORDS)[number % 3]
            words = generator.choices(WORDS[verdict], k=6)
            writer.writerow([number, verdict, f'"{words[0]}, {words[1]}"\n' + " ".join(words[2:])])


def write_pairs(file: Path, rows: int) -> None:
    """Rows whose class only the second text tells."""
    generator = random.Random(rows)
    with gzip.open(file, "wt", encoding="utf-8") as opened:
        for number in range(rows):
            second = generator.choices(list(WORDS.values())[number % 3], k=6)
            first = generator.choices([word for words in WORDS.values() for word in words], k=6)
            row = {"premise": " ".join(first), "hypothesis": " ".join(second), "label": number % 3, "idx": number}
            opened.write(json.dumps(row) + "\n")


@pytest.mark.parametrize("is_pairs", [False, True], ids=["words as labels in CSV", "pairs in gzipped JSONL"])
def test_all_programs_find_the_same_accuracy(tiny_encoder: Path, tmp_path: Path, is_pairs: bool) -> None:
    texts, label, answer, names = ["--text-column", "review"], "verdict", "label", ["bad", "good", "so, so"]
    if is_pairs:
        texts = ["--text-column", "premise", "--text-pair-column", "hypothesis"]
        label, answer, names = "label", "predicted_label", ["0", "1", "2"]
    for split, rows in (("train", 120), ("dev", 30), ("test", 60)):
        file = tmp_path / f"{split}.{'jsonl.gz' if is_pairs else 'csv'}"
        (write_pairs if is_pairs else write_csv)(file, rows)
    options = [*texts, "--label-column", label if is_pairs else "2", "--epochs", 12, "--lr", 3e-3]
    train.main(train_options(tiny_encoder, tmp_path, tmp_path / "run", *options, "--warmup-ratio", 0.1))
    model, output = tmp_path / "run" / "model", tmp_path / "out.csv.gz"
    assert list(json.loads((model / "config.json").read_text())["id2label"].values()) == names
    (final,) = [line for line in metrics(tmp_path / "run") if line.get("split") == "test"]
    assert final["rows"] == 60 and final["accuracy"] > 0.9

    common = ["--model", str(model), "--device", "cpu"]
    predict.main([*common, "--input", str(file), "--output", str(output), *texts])
    with gzip.open(output, "rt", encoding="utf-8", newline="") as opened:
        found: list[dict[str, Any]] = list(csv.DictReader(opened))
    assert sum(abs(float(row["probability"]) - 0.5) for row in found) > 0
    assert sum(row[answer] == row[label] for row in found) / len(found) == pytest.approx(final["accuracy"])
    if is_pairs:
        first = ["--input", str(file), "--output", str(tmp_path / "first.csv"), *texts[:2]]
        assert "was trained on pairs of texts" in refusal(predict.main, [*common, *first])

    numbers, scripted = tmp_path / "numbers.json", tmp_path / "classifier.pt"
    evaluate.main([*common, "--file", f"test={file}", "--json", str(numbers), *texts, "--label-column", label])
    assert json.loads(numbers.read_text())["files"]["test"]["accuracy"] == pytest.approx(final["accuracy"])
    if versions.has_torchtext():
        export.main([*common[:2], "--format", "torchscript", "--output", str(scripted)])
        importlib.import_module("torchtext")  # which owns an operator of the file
        alone = [" ".join(words) for words in WORDS.values()]
        labels, _ = torch.jit.load(scripted)(*([alone] * (1 + is_pairs)))
        assert sorted(labels) == names, "each class's own words"


def test_check_replaces_its_own_report_only(train_words: Words, small_data: Path, tmp_path: Path) -> None:
    """It says what is trained on: here without a row of dev, and cut."""
    lines = (small_data / "dev.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    with (small_data / "train.tsv").open("a", encoding="utf-8") as file:
        file.write(lines[1])
    report, words = tmp_path / "report.json", train_words(tmp_path / "run", "--drop-leaks", "--max-length", 12)
    for _ in range(2):
        train.main([*words, "--check", str(report)])
    found = json.loads(report.read_text(encoding="utf-8"))
    counts = {name: (split["rows"], sum(split["classes"].values())) for name, split in found.items()}
    assert counts == {"train": (50, 50), "dev": (20, 20)}
    assert [row[0] for row in found["dev"]["examples"]] == [line.split("\t")[0] for line in lines[1:4]]
    assert 0 < found["dev"]["truncated"] <= 20
    train_file = small_data / "train.tsv"
    before = train_file.read_bytes()
    says = user_error(train.main, [*words, "--check", str(train_file)])
    assert f"--check {train_file} already exists and is not a report of --check; choose another file" in says
    assert train_file.read_bytes() == before
    assert not (tmp_path / "run").exists()
