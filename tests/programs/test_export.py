"""The export program: what it refuses, what it removes again, and what it says."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Capture, Patch, RunTrain, assert_equal, needs_torchtext, refusal, run_export, user_error
from safetensors.torch import load_file

from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.programs import export
from sst2_xlmr.util import versions


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folder_is_rewritten_with_its_card(model: Path, tmp_path: Path, dtype: str, capsys: Capture) -> None:
    source, copy = Path(shutil.copytree(model, tmp_path / "source")), tmp_path / "copy"
    (source / "README.md").write_text("what it is")
    (tmp_path / "texts.txt").write_text("A fine film.\nEin guter Film.\n", encoding="utf-8")
    options = ["--check-file", tmp_path / "texts.txt", *(["--dtype", "bf16"] if dtype == "bfloat16" else [])]
    run_export("--model", source, "--format", "hf", "--output", copy, *options)
    assert "same answers on 2 rows, probabilities within " in capsys.readouterr().out
    before, after = load_file(source / "model.safetensors"), load_file(copy / "model.safetensors")
    assert_equal(after, {name: tensor.to(getattr(torch, dtype)) for name, tensor in before.items()})
    assert sorted(file.name for file in copy.iterdir()) == sorted(file.name for file in source.iterdir())
    assert (copy / "README.md").read_text() == "what it is"
    assert json.loads((copy / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("options", "spoiled"),
    [
        ("--format hf --dtype bf16", lambda p: p + np.array([0.1, -0.1])),
        ("--format hf", lambda p: p * math.nan),
        ("--format onnx", lambda p: p + np.array([2e-4, -2e-4])),
        ("--format onnx-int8 --check-file en=rows.tsv", lambda p: 1 - p),
        pytest.param("--format torchscript", lambda p: p + np.array([2e-5, -2e-5]), marks=needs_torchtext),
    ],
)
def test_wrong_answers_are_removed(model: Path, tmp_path: Path, options: str, spoiled: Any, monkeypatch: Patch) -> None:
    def spoil(written: Any) -> Any:
        def write(*given: Any) -> Any:
            classify = written(*given)
            return lambda *rows: spoiled(classify(*rows)).astype(np.float32)

        return write

    if "onnx" in options:
        pytest.importorskip("onnxruntime_extensions")
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"film number {n} was fine\t{'ab'[n % 2]}\n" for n in range(40))
    (tmp_path / "rows.tsv").write_text(f"text\tlabel\n{rows}")
    for name in ("write_hugging_face", "write_torchscript", "write_onnx_file"):
        monkeypatch.setattr(export, name, spoil(getattr(export, name)))
    says = "the written model disagrees with "
    if "int8" in options:
        says = "int8 changes 40 of 40 labels of fp32, 100.00% (limit 1.00%); use fp32, or raise"
    assert says in user_error(run_export, "--model", model, "--output", "out/x", *options.split())
    assert not list((tmp_path / "out").iterdir())


def test_onnx_with_wrong_labels(model: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    onnx_file = pytest.importorskip("sst2_xlmr.export.onnx")
    write_onnx = onnx_file.write_onnx

    def write_wrong(file: Path, weights: Any, shape: Any, task: Any, *more: Any) -> None:
        write_onnx(file, weights, shape, type(task)(task.label_names[::-1]), *more)

    monkeypatch.setattr(onnx_file, "write_onnx", write_wrong)
    options = ["--model", model, "--format", "onnx", "--output", tmp_path / "x"]
    assert "labels do not follow from its prob" in user_error(run_export, *options)
    assert not list(tmp_path.iterdir())


def test_a_result_that_is_written_is_a_success_whoever_reads(model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("A fine film.\n")
    words = ["--model", str(model), "--format", "hf", "--output", str(tmp_path / "x")]
    words += ["--keep-vocabulary-of", str(tmp_path / "texts.txt")]  # says a line before all is done, too
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "scripts/export.py", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: cannot write to standard output: ") and done.stderr.count("\n") == 1
    assert (tmp_path / "x" / "model.safetensors").is_file()


WRONG_USE = {
    "--format torchscript --dtype bf16": "--dtype bf16 is for --format hf",
    "--format torchscript": "--format torchscript needs torchtext under torch 2.3.1, and this is Python",
    "--format hf --check-file no/such": "cannot read no/such: No such file",
    "--format hf --check-file empty": "empty has no rows",
    "--format hf --text-column x": "--text-column needs a .tsv, .csv, .jsonl or .parquet file",
    "--format hf --output empty": "--output empty already exists",
    "--format onnx-int8": "--format onnx-int8 needs --check-file",
    "--format onnx": "larger than the 2 GB of an ONNX file",
    "--format onnx --check-file 1.tsv --text-pair-column kind": "export pairs with --from-ids",
    # Accuracy is not left out where it was asked for.
    "--format onnx-int8 --check-file 1.tsv --label-column x": "no column 'x' among text, kind",
    "--format onnx-int8 --check-file 2.tsv --label-column label": "two columns are named",
}


@pytest.mark.parametrize("options", WRONG_USE)
def test_wrong_use(model: Path, tmp_path: Path, options: str, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(versions, "has_torchtext", lambda: False)
    if "onnx" in options:
        pytest.importorskip("onnxruntime_extensions")
        monkeypatch.setattr(pytest.importorskip("sst2_xlmr.export.onnx"), "_LARGEST_FILE", 1000)
    files = {"empty": "", "1.tsv": "text\tkind\nfine\ta\n", "2.tsv": "text\tlabel\tlabel\nfine\ta\ta\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert WRONG_USE[options] in user_error(run_export, "--model", model, "--output", "x", *options.split())
    assert {file.name for file in tmp_path.iterdir()} == files.keys()


def test_a_runs_folder_is_refused(run_train: RunTrain, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--max-steps", 1)
    assert f"is the folder of a run; give the model in it, {run / 'model'}" in refusal(find_encoder, str(run))
    says = "step-00000001 is a checkpoint, .*; give best or model in the run's folder"
    assert re.search(says, refusal(find_encoder, str(run / "checkpoints" / "step-00000001")))
