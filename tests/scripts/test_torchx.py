"""`scripts/torchx_app.py` under TorchX: on this machine, and on a real SLURM of two nodes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, losses, metrics, train_options
from test_slurm import JOB_TIMEOUT_S, LAB, UNFINISHED, UP, _slurm, job_facts

from sst2_xlmr import train

TORCHX = os.environ.get("SST2_XLMR_TEST_TORCHX") or shutil.which("torchx") or ""
COMPONENT = "scripts/torchx_app.py:train"
FROM_SCRATCH = ("--epochs", 1, "--dropout", 0, "--head-dropout", 0)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TORCHX, reason="no torchx in PATH, nor does SST2_XLMR_TEST_TORCHX name one"),
]
__all__ = ["_slurm"]  # a fixture


def torchx(scheduler: str, component: list[object], options: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the component, with this Python for the training processes; TorchX may live in an environment of its own."""
    command = [TORCHX, "run", "-s", scheduler, COMPONENT, *component, "--python", sys.executable, "--", *options]
    env = {**os.environ, "SLURM_CONF": str(LAB / "etc" / "slurm.conf")}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.parametrize("processes", [1, 2])
def test_local_run_has_the_metrics_of_a_plain_one(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, processes: int
) -> None:
    train.main(train_options(tiny_encoder, small_data, tmp_path / "plain", *FROM_SCRATCH))
    options = train_options(tiny_encoder, small_data, tmp_path / "run", *FROM_SCRATCH)
    done = torchx("local_cwd", ["--nproc", processes], options)
    assert done.returncode == 0, done.stderr
    assert f", {processes} process" in done.stdout + done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert metrics(tmp_path / "run")[-1]["accuracy"] == metrics(tmp_path / "plain")[-1]["accuracy"]


def test_arguments_arrive_as_they_are(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    """TorchX replaces `$` and `${...}` in arguments, a shell splits at spaces."""
    run = tmp_path / "with space, $HOME and ${app_id}"
    done = torchx("local_cwd", [], train_options(tiny_encoder, small_data, run, "--max-steps", 1))
    assert done.returncode == 0, done.stderr
    assert (run / "model" / "config.json").is_file()


def test_a_mistake_is_said_and_fails(tmp_path: Path) -> None:
    done = torchx("local_cwd", ["--nproc", 2], ["--epoch", "3", "--output-dir", str(tmp_path / "run")])
    assert done.returncode != 0
    said = [line for line in (done.stdout + done.stderr).splitlines() if "error: unknown argument --epoch" in line]
    assert len(said) == 1
    assert "did you mean --epochs?" in said[0]


@pytest.mark.skipif(not UP.is_file(), reason=f"{UP} is not there")
@pytest.mark.usefixtures("_slurm")
@pytest.mark.parametrize(("nodes", "processes"), [(1, 2), (2, 1)])
def test_slurm(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, nodes: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.main(train_options(tiny_encoder, small_data, tmp_path / "plain", *FROM_SCRATCH))
    options = train_options(tiny_encoder, small_data, tmp_path / "run", *FROM_SCRATCH)
    # Without accounting in SLURM, TorchX fails after it has submitted the job and said its number.
    said = torchx("slurm", ["--nodes", nodes, "--nproc", processes, "--cpu", 1], options)
    found = re.search(r"slurm://torchx/(\d+)", said.stdout)
    assert found, said.stderr
    job = found[1]
    try:
        end = time.monotonic() + JOB_TIMEOUT_S
        while (facts := job_facts(job))["JobState"] in UNFINISHED and time.monotonic() < end:
            time.sleep(0.5)
        logs = {file.name: file.read_text() for file in sorted(ROOT.glob(f"slurm-{job}*"))}
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), logs
        assert "2 processes" in logs[f"slurm-{job}-train-0.out"]
    finally:
        for file in ROOT.glob(f"slurm-{job}*"):
            file.unlink()
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert metrics(tmp_path / "run")[-1]["accuracy"] == metrics(tmp_path / "plain")[-1]["accuracy"]
