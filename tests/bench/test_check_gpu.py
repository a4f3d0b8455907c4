"""scripts/check_gpu.sh: its checks on a CPU, where they compare it with itself; on a GPU the whole of it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from sst2_xlmr.model.encoders import EncoderShape

gpu_checks, check_gpu = (importlib.import_module(name) for name in ("gpu_checks", "check_gpu"))

CPU = torch.device("cpu")
TINY = EncoderShape(hidden=32, layers=2, heads=2, ffn=64, positions=66)


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "check_gpu.sh"), *options]
    return subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SST2_XLMR_CACHE", os.environ["SST2_XLMR_CACHE"])  # so that what the script sets is undone
    made = check_gpu.Inputs(tmp_path, check_gpu.parse_args(["--device", "cpu", "--batch-sizes", "8"]), CPU)
    made.config = dataclasses.replace(made.config, max_length=64)
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    done = run_script()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --device cuda: torch finds no CUDA GPU on this machine; use --device cpu\n"


def test_checks_pass_where_nothing_is_wrong(inputs: Any) -> None:
    spec = tiny_spec(inputs)
    figures = gpu_checks.check_parity(spec, CPU)
    assert 0 <= figures["loss_relative"] < 1e-4
    assert gpu_checks.check_repetition(spec, CPU)["deterministic"] == {"16": True, "64": True}
    assert abs(gpu_checks.check_bf16(spec, CPU)["mean_difference"]) < 0.02


def tiny_spec(inputs: Any) -> Any:
    return check_gpu.read_spec(inputs.write("checks", TINY, batch_size=8, steps=20, lr=1e-3))


def test_checks_fail_where_something_is_wrong(inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose attention is a little off, and one whose results change from run to run."""
    spec = tiny_spec(inputs)
    attention = torch.nn.functional.scaled_dot_product_attention

    def noisy(*arguments: Any, **options: Any) -> torch.Tensor:
        mixed = attention(*arguments, **options)
        return mixed + 1e-2 * torch.rand((), generator=generator) * mixed.detach()

    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noisy)
    with pytest.raises(AssertionError, match="gradient_relative"):
        gpu_checks.check_parity(spec, CPU)
    with pytest.raises(AssertionError, match="'deterministic': {'16': False"):
        gpu_checks.check_repetition(spec, CPU)


@pytest.mark.slow
def test_the_whole_script_on_a_cpu(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--layers", "1", "--batch-sizes", "4", "--steps", "2", "--rounds", "1", "--no-peer"]
    check_whole(run_script(*options, "--out", str(tmp_path / "gpu.json")), tmp_path / "gpu.json")


@pytest.mark.cuda
def test_the_whole_script_on_a_gpu(tmp_path: Path) -> None:
    check_whole(run_script("--out", str(tmp_path / "gpu.json")), tmp_path / "gpu.json")


def check_whole(done: subprocess.CompletedProcess[str], out: Path) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert not [check for check in result["checks"].values() if "failed" in check]
    assert "parity with the CPU   ok" in done.stdout
    assert all(figures["samples_per_s"] > 0 for figures in result["training"].values())
