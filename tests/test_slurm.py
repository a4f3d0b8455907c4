"""`scripts/train.sbatch` on a real SLURM of two nodes, both of them this machine, on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, losses, metrics, train_options

import train

UP = Path(os.environ.get("SST2_XLMR_SLURM_UP", ROOT.parent / "shared" / "slurm" / "up.sh"))
LAB = Path(tempfile.gettempdir()) / "slurm-lab"  # where up.sh puts its files
UP_TIMEOUT_S = 120  # it may have to install SLURM
JOB_TIMEOUT_S = 60
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not UP.is_file(), reason=f"{UP} is not there; SST2_XLMR_SLURM_UP may name another script that starts SLURM"
    ),
]


def call(*command: Any, timeout_s: float = 20, environment: dict[str, str] | None = None) -> str:
    """Run a command of SLURM's (or its lab's) from the project's folder; returns what it printed."""
    env = {**os.environ, "SLURM_CONF": str(LAB / "etc" / "slurm.conf"), **(environment or {})}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def is_running() -> bool:
    try:
        call("scontrol", "ping")
    except (AssertionError, OSError):
        return False
    return True


@pytest.fixture(scope="module")
def _slurm() -> Iterator[None]:
    """Two nodes; ended afterwards, unless they were there before."""
    was_running = is_running()
    try:
        call(UP, timeout_s=UP_TIMEOUT_S)
        yield
    finally:
        if not was_running:
            call(UP.with_name("down.sh"), timeout_s=60)


def job_facts(job: str) -> dict[str, str]:
    """Return `scontrol show job` as a dictionary."""
    return dict(re.findall(r"(\w+)=(\S*)", call("scontrol", "--oneliner", "show", "job", job)))


def run_job(
    log: Path, nodes: int, processes: int, run: Path, options: list[str], **environment: str
) -> tuple[dict[str, str], str]:
    """Submit the script with `environment` as the user of a cluster without GPUs does; wait for the job's end.

    Args:
        log: a file that is not there yet.
        nodes, processes: of the job; of each node.
        run: the run's folder.
        options: of `train.py`.

    Returns:
        What SLURM says of the job, and the job's log.
    """
    settings = {"RUN": str(run), "DEVICE": "cpu", "PROCESSES_PER_NODE": str(processes), "PYTHON": sys.executable}
    settings.update(environment)
    resources = [f"--nodes={nodes}", "--cpus-per-task=2", "--gres=none", "--time=2", f"--output={log}"]
    script = ["scripts/train.sbatch", *options]
    job = call("sbatch", "--parsable", *resources, *script, environment=settings)
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while (facts := job_facts(job))["JobState"] in UNFINISHED:
        if time.monotonic() > deadline:
            call("scancel", job)
            written = log.read_text(encoding="utf-8") if log.is_file() else "no log"
            pytest.fail(f"job {job} is {facts['JobState']} ({facts['Reason']}) after {JOB_TIMEOUT_S} s: {written}")
        time.sleep(0.5)
    return facts, log.read_text(encoding="utf-8")


def job_options(encoder: Path, data: Path, *options: Any) -> list[str]:
    """Return `train_options` without those that the script itself gives."""
    words = train_options(encoder, data, Path("unused"), *options)
    for given in ("--output-dir", "--device"):
        at = words.index(given)
        del words[at : at + 2]
    return words


@pytest.mark.usefixtures("_slurm")
@pytest.mark.parametrize(("nodes", "processes"), [(1, 2), (2, 1)])
def test_job_trains_as_one_process_and_resumes(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, nodes: int, processes: int
) -> None:
    exact = ["--epochs", 2, "--dropout", 0, "--head-dropout", 0]
    train.main(train_options(tiny_encoder, small_data, tmp_path / "one", *exact))
    run, options = tmp_path / "job", job_options(tiny_encoder, small_data, *exact)

    facts, log = run_job(tmp_path / "first.log", nodes, processes, run, options)
    assert (facts["JobState"], facts["ExitCode"], facts["NumNodes"]) == ("COMPLETED", "0:0", str(nodes)), log
    assert "2 processes" in log
    assert "resume " not in log
    for line in ("encoder ", "step     14/14 ", "model "):
        assert len([said for said in log.splitlines() if said.startswith(line)]) == 1, f"only rank 0 speaks: {log}"
    assert len(losses(run)) == 14
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert metrics(run)[-1]["accuracy"] == metrics(tmp_path / "one")[-1]["accuracy"]

    before = metrics(run)
    facts, log = run_job(tmp_path / "second.log", nodes, processes, run, options)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert re.search(r"^resume +from .*step-00000014$", log, re.MULTILINE), log
    assert metrics(run) == before


@pytest.mark.usefixtures("_slurm")
def test_wrong_flag_fails_with_one_line_from_the_slowest_node(tmp_path: Path) -> None:
    """Rank 0 says what is wrong, even where another node has found it, and ended, long before."""
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text("import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(8)\n")
    facts, log = run_job(tmp_path / "log", 2, 1, tmp_path / "job", ["--epoch", "3"], PYTHONPATH=str(late))
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "1:0"), log
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    # Every node finds it by itself, before they talk to one another, and its first process says it.
    assert set(errors) == {"error: unknown argument --epoch; did you mean --epochs?"}, log
    assert len(errors) <= 2, log
    assert not (tmp_path / "job").exists()


@pytest.mark.usefixtures("_slurm")
def test_missing_python_fails_with_one_line(tmp_path: Path) -> None:
    facts, log = run_job(tmp_path / "log", 1, 1, tmp_path / "job", [], PYTHON="no/such/python")
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), log
    assert log.startswith("error: no train.py or no no/such/python in ") and log.count("\n") == 1, log
