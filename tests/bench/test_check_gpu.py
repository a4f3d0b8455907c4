"""scripts/check_gpu.sh: its checks on a CPU, where they compare it with itself; on a GPU the whole of it."""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Patch
from safetensors.torch import load_file, save_file

from sst2_xlmr import __version__
from sst2_xlmr.cli import parse_args
from sst2_xlmr.programs import predict

check_gpu = importlib.import_module("check_gpu")


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    command, environment = [str(ROOT / "scripts" / "check_gpu.sh"), *options], {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    done = run_script()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --device cuda: torch finds no CUDA GPU on this machine; use --device cpu\n"


def run_program(wrong: str, root: Path, program: str, options: list[Any], folder: Path, processes: int = 0) -> None:
    """Stands in for a program on a device, which computes the same in every run but that whose name is `wrong`."""
    words = [str(option) for option in options]
    if "predict" in program:
        output = predict.parse_args(words).output
        shift = 0.1 if output.stem == wrong else 0.0
        output.write_text("".join(json.dumps({"probability_1": n / 8 + shift}) + "\n" for n in range(4)))
        return
    config, resume = parse_args(words)
    run = Path(str(config.output_dir))
    is_wrong = run.name == wrong or (resume and wrong == f"{run.name} resumed")
    for name in ("model", "best", "checkpoints/step-00000020"):
        (run / name).mkdir(parents=True, exist_ok=True)
    lines = [{"step": n, "lr": 1.0, "loss": 1 / n + 0.03 * is_wrong} for n in range(1, config.max_steps + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.json").write_text(json.dumps({"sst2_xlmr": __version__, **dataclasses.asdict(config)}))
    weights = load_file(Path(config.encoder) / "model.safetensors")
    changed = {name: tensor + 0.01 + 0.001 * is_wrong for name, tensor in weights.items()}
    save_file(changed, run / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("check", "wrong", "says"),
    [
        ("check_parity", "micro-batches", "micro-batches: loss"),
        ("check_lower_precision", "curve-bf16", "'bf16': 0.02999"),
        ("check_bits", "fp32-second", "'fp32 repeated': False"),
        ("check_bits", "bf16-second resumed", "'bf16 repeated': True, 'bf16 resumed': False"),
        ("check_prediction", "fp32", "'fp32': 0.1"),
    ],
)
def test_checks_fail_where_a_run_differs(check: str, wrong: str, says: str, tmp_path: Path, monkeypatch: Patch) -> None:
    for name in ("right", "wrong"):
        folder = tmp_path / name
        folder.mkdir()
        check_gpu.write_inputs(folder, "tiny", rows=20)
        train = functools.partial(check_gpu.run_train, folder, "cpu", "checked")
        stand_in = functools.partial(run_program, wrong if name == "wrong" else "")
        monkeypatch.setattr(check_gpu, "run_program", stand_in)
        expectation = pytest.raises(AssertionError, match=says) if name == "wrong" else contextlib.nullcontext()
        with expectation:
            assert getattr(check_gpu, check)(train, folder, "cpu")


ON_A_CPU = "--device cpu --shape tiny --batch-sizes 4 --steps 2 --rounds 1"
ON_A_GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("options", [pytest.param(ON_A_CPU, marks=pytest.mark.slow), pytest.param("", marks=ON_A_GPU)])
def test_the_whole_script(options: str) -> None:
    done = run_script(*options.split())
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert not [check for check in result["checks"].values() if "failed" in check]
    assert "parity: {'figures': " in done.stderr
    assert all(figures["ours"]["samples_per_s"]["median"] > 0 for figures in result["training"].values())
