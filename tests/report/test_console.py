"""The report of a run: the header, what is on the disk at once, and that no error of its own hides another."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ALONE, Patch, RunTrain, metrics, train_options, user_error
from running import resume

from sst2_xlmr.cli import parse_args
from sst2_xlmr.data.prepare import prepare
from sst2_xlmr.model.vocabulary import EMBEDDING
from sst2_xlmr.report.console import Report
from sst2_xlmr.report.header import header_lines
from sst2_xlmr.training.state import TrainState


@pytest.mark.parametrize(
    ("precision", "decided", "reason", "says"),
    [
        ("auto", "bf16", "", "1 process; precision auto -> bf16 with fp32 master weights; engine"),
        ("fp32", "fp32", "as asked", "1 process; fp32; plain PyTorch: slower (as asked)"),
        ("bf16", "bf16", "no GCC that works", "bf16 autocast; plain PyTorch: slower (no GCC that works)"),
    ],
)
def test_the_header_says_what_was_decided(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, precision: str, decided: str, reason: str, says: str
) -> None:
    options = ["--precision", precision, "--epochs", 1.5]
    config, _ = parse_args(train_options(tiny_encoder, small_data, tmp_path / "run", *options))
    inputs = prepare(config, quiet=True)
    state, world, rows = TrainState(7, decided, 4), ALONE, inputs.encoder.shape.vocab_size
    weights = {EMBEDDING: torch.empty(rows - 100, 32), "big": torch.empty(1000, 1000), "head": torch.empty(1000, 100)}
    moments = {f"{kind}.head": weights["head"] for kind in ("exp_avg", "exp_avg_sq")}
    optimizer: Any = SimpleNamespace(weights=lambda: weights, moments=lambda: moments, shares_memory=False)
    lines = header_lines(inputs, state, optimizer, reason, world, head_is_new=True)
    by_name = {line[:10].rstrip(): line[11:] for line in lines}
    assert list(by_name) == ["stack", "encoder", "rows", "classes", "batches", "device"]
    assert by_name["encoder"].endswith(
        f"3 layers, 32 wide, 1.1 M parameters, 0.1 M trained ({rows - 100} of {rows} embedding rows occur);"
        " new head for negative, positive"
    )
    assert by_name["rows"] == "train 50, dev 20; 3 cut to 64 tokens"
    assert by_name["batches"] == "7 an epoch, of 8 rows; 1.5 epochs, 10 steps, evaluation every 4"
    assert says in by_name["device"]


@pytest.mark.parametrize("what", ["metrics", "events"])
def test_a_run_whose_disk_fills_resumes(run_train: RunTrain, tmp_path: Path, monkeypatch: Patch, what: str) -> None:
    """What is said is one line, without a traceback from the thread that writes events."""
    run, log_training = tmp_path / "run", Report.log_training

    def fill_at_step_5(report: Report, entry: dict[str, Any]) -> None:
        if entry["step"] == 5 and what == "metrics":
            os.dup2(os.open("/dev/full", os.O_WRONLY), report._metrics.fileno())
        elif entry["step"] == 5:
            for file in (run / "tensorboard").iterdir():  # every record is written to the name
                file.unlink()
                file.symlink_to("/dev/full")
        log_training(report, entry)

    with monkeypatch.context() as patched:
        patched.setattr(Report, "log_training", fill_at_step_5)
        line = user_error(run_train, run, "--epochs", 1, "--save-every", 3)
    place = run / ("metrics.jsonl" if what == "metrics" else "tensorboard")
    assert f"cannot write {what} to {place}: No space left on device; free some space, then continue" in line
    for file in (run / "tensorboard").iterdir():
        file.unlink()
    resume(run)
    assert [entry["step"] for entry in metrics(run) if "split" not in entry] == list(range(1, 8))
