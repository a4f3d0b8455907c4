"""Everything works without the folder `engines/`, and computes what `--no-compile` computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, RunTrain, Words, launcher, losses, metrics, train_options
from safetensors.torch import load_file

PROGRAM = """
import sys
import sst2_xlmr
from sst2_xlmr import train
from sst2_xlmr.programs import evaluate, predict
at = [number for number, word in enumerate(sys.argv) if word == "--then"]
train.main(sys.argv[1 : at[0]])
evaluate.main(sys.argv[at[0] + 1 : at[1]])
predict.main(sys.argv[at[1] + 1 :])
print(sst2_xlmr.__file__)
"""


@pytest.fixture(scope="module")
def stripped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without engines."""
    copy = tmp_path_factory.mktemp("stripped")
    shutil.copy(ROOT / "train.py", copy)
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    shutil.copytree(ROOT / "sst2_xlmr", copy / "sst2_xlmr", ignore=shutil.ignore_patterns("engines", "__pycache__"))
    return copy


def run(stripped: Path, *words: object) -> str:
    """Run a command from the copy; returns what it prints."""
    command = list(map(str, words))
    environment = {**os.environ, "PYTHONPATH": str(stripped)}
    done = subprocess.run(command, cwd=stripped, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trains_evaluates_and_predicts(
    stripped: Path, run_train: RunTrain, tiny_encoder: Path, small_data: Path, tmp_path: Path, precision: str
) -> None:
    options = ["--epochs", 1, "--precision", precision, "--micro-batch-size", 5]
    folder, reference = tmp_path / "run", run_train(tmp_path / "reference", *options, "--no-compile")
    model = ["--model", folder / "model", "--device", "cpu", "--precision", precision]
    words = train_options(tiny_encoder, small_data, folder, *options)
    then = ["--then", *model, "--file", f"dev={small_data / 'dev.tsv'}", "--then", *model, "A fine film."]
    said = run(stripped, sys.executable, "-c", PROGRAM, *words, *then)
    assert "plain PyTorch: slower" in said
    assert losses(folder) == losses(reference)
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (folder, reference))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert f"{metrics(folder)[-1]['accuracy']:.4f}" in said.split("\nmodel  ")[1]
    *_, answer, file = said.splitlines()
    assert answer.count("\t") == 2
    assert file.startswith(f"{stripped}/sst2_xlmr")


def test_two_processes_train(stripped: Path, run_train: RunTrain, train_words: Words, tmp_path: Path) -> None:
    options = ["--epochs", 1, "--dropout", 0, "--head-dropout", 0]
    words = train_words(tmp_path / "run", *options)
    assert "2 processes;" in run(stripped, *launcher(2), "train.py", *words)
    alone = run_train(tmp_path / "alone", *options, "--no-compile")
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
