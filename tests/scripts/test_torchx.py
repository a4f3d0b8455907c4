"""`scripts/torchx_app.py` under TorchX, on this machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Words, losses, metrics

from sst2_xlmr import train

TORCHX = os.environ.get("SST2_XLMR_TEST_TORCHX") or shutil.which("torchx") or ""
COMPONENT = "scripts/torchx_app.py:train"
FROM_SCRATCH = ("--epochs", 1, "--dropout", 0, "--head-dropout", 0)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not TORCHX, reason="there is no torchx, nor SST2_XLMR_TEST_TORCHX")]


def torchx(processes: int, options: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the component, with this Python for the training processes; TorchX may live in an environment of its own."""
    command = [TORCHX, "run", "-s", "local_cwd", COMPONENT, "--nproc", str(processes), "--python", sys.executable, "--"]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)


def test_local_run_has_the_metrics_of_a_plain_one(train_words: Words, tmp_path: Path) -> None:
    """Arguments arrive as they are: TorchX replaces `$` and `${...}` in them, a shell splits at spaces."""
    train.main(train_words(tmp_path / "plain", *FROM_SCRATCH))
    run = tmp_path / "with space, $HOME and ${app_id}"
    done = torchx(2, train_words(run, *FROM_SCRATCH))
    assert done.returncode == 0, done.stderr
    assert ", 2 process" in done.stdout + done.stderr
    assert losses(run) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert metrics(run)[-1]["accuracy"] == metrics(tmp_path / "plain")[-1]["accuracy"]


def test_a_mistake_is_said_and_fails(tmp_path: Path) -> None:
    done = torchx(2, ["--epoch", "3", "--output-dir", str(tmp_path / "run")])
    assert done.returncode != 0
    said = [line for line in (done.stdout + done.stderr).splitlines() if "error: unknown argument --epoch" in line]
    assert len(said) == 1
    assert "did you mean --epochs?" in said[0]
