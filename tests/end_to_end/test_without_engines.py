"""Everything works without the folder `engines/`, and computes what `--no-compile` computes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, losses, metrics, train_options
from running import launcher
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def stripped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without engines."""
    copy = tmp_path_factory.mktemp("stripped")
    shutil.copy(ROOT / "train.py", copy)
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    shutil.copytree(ROOT / "sst2_xlmr", copy / "sst2_xlmr", ignore=shutil.ignore_patterns("engines", "__pycache__"))
    return copy


def run(stripped: Path, *words: object, processes: int = 1) -> str:
    """Run a program of the copy; returns what it prints."""
    command = [*launcher(processes), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(stripped)}
    done = subprocess.run(command, cwd=stripped, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trains_evaluates_and_predicts(
    stripped: Path,
    run_train: Callable[..., Path],
    tiny_encoder: Path,
    small_data: Path,
    tmp_path: Path,
    precision: str,
) -> None:
    options = ["--epochs", 1, "--precision", precision, "--micro-batch-size", 5]
    reference = run_train(tmp_path / "reference", *options, "--no-compile")
    folder = tmp_path / "run"
    said = run(stripped, "train.py", *train_options(tiny_encoder, small_data, folder, *options))
    assert "plain PyTorch: slower" in said
    assert f"{stripped}/sst2_xlmr" in run(stripped, "-c", "import sst2_xlmr; print(sst2_xlmr.__file__)")
    assert losses(folder) == losses(reference)
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (folder, reference))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    model = ["--model", folder / "model", "--device", "cpu", "--precision", precision]
    table = run(stripped, "scripts/evaluate.py", *model, "--file", f"dev={small_data / 'dev.tsv'}")
    assert f"{metrics(folder)[-1]['accuracy']:.4f}" in table
    assert run(stripped, "scripts/predict.py", *model, "A fine film.").count("\t") == 2


def test_two_processes_train(stripped: Path, tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    options = ["--epochs", 1, "--dropout", 0, "--head-dropout", 0]
    words = train_options(tiny_encoder, small_data, tmp_path / "run", *options)
    assert "2 processes;" in run(stripped, "train.py", *words, processes=2)
    alone = run(stripped, "train.py", *train_options(tiny_encoder, small_data, tmp_path / "alone", *options))
    assert "1 process;" in alone
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
