"""`scripts/train.sbatch` on a real SLURM of two nodes, both of them this machine, on the CPU."""

import contextlib
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
from running import digests, logged, torchrun

from sst2_xlmr import train

UP = Path(os.environ.get("SST2_XLMR_SLURM_UP", "up.sh"))
LAB = Path(tempfile.gettempdir()) / "slurm-lab"  # where up.sh puts its files
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("_slurm"),
    pytest.mark.skipif(not UP.is_file(), reason="SST2_XLMR_SLURM_UP names no script that starts SLURM"),
]


def call(*command: Any, timeout_s: float = 20, environment: dict[str, str] | None = None) -> str:
    """Run a command of SLURM's (or its lab's) from the project's folder; returns what it printed."""
    env = {**os.environ, "SLURM_CONF": str(LAB / "etc" / "slurm.conf"), **(environment or {})}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def _slurm() -> Iterator[None]:
    """Two nodes; ended afterwards, unless they were there before."""
    was_running = False
    with contextlib.suppress(AssertionError, OSError):
        was_running = bool(call("scontrol", "ping"))
    try:
        call(UP, timeout_s=120)  # it may have to install SLURM
        yield
    finally:
        if not was_running:
            call(UP.with_name("down.sh"), timeout_s=60)


def job_facts(job: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", call("scontrol", "--oneliner", "show", "job", job)))


def submit(
    log: Path, nodes: int, processes: int, run: Path, options: list[str], *resources: str, **environment: str
) -> str:
    """Submit the script as the user of a cluster without GPUs does, `processes` a node; returns the job's number."""
    settings = {"RUN": str(run), "DEVICE": "cpu", "PROCESSES_PER_NODE": str(processes), "PYTHON": sys.executable}
    settings.update(environment)
    fixed = [f"--nodes={nodes}", "--cpus-per-task=2", "--gres=none", "--time=2", "--signal=B:USR1@5", f"--output={log}"]
    return call("sbatch", "--parsable", *fixed, *resources, "scripts/train.sbatch", *options, environment=settings)


def wait_for_end(job: str, log: Path, timeout_s: float = 60) -> tuple[dict[str, str], str]:
    """Wait for a job's end; a requeued one is started at once, without the two minutes that SLURM keeps it waiting."""
    deadline = time.monotonic() + timeout_s
    while (facts := job_facts(job))["JobState"] in UNFINISHED:
        if time.monotonic() > deadline:
            call("scancel", job)
            written = log.read_text(encoding="utf-8") if log.is_file() else "no log"
            pytest.fail(f"job {job} is {facts['JobState']} ({facts['Reason']}) after {timeout_s} s: {written}")
        if facts["JobState"] == "PENDING" and facts["Reason"] == "BeginTime":
            time.sleep(3)  # a start within the second of the requeueing fails: «Job credential revoked»
            call("scontrol", "update", f"jobid={job}", "StartTime=now")
        time.sleep(0.5)
    return facts, log.read_text(encoding="utf-8")


def job_options(encoder: Path, data: Path, *options: Any) -> list[str]:
    """Return `train_options` without those that the script itself gives."""
    words = train_options(encoder, data, Path("unused"), *options)
    for given in ("--output-dir", "--device"):
        at = words.index(given)
        del words[at : at + 2]
    return words


@pytest.mark.parametrize(("nodes", "processes"), [(1, 2), (2, 1)])
def test_job_and_its_resume(tiny_encoder: Path, small_data: Path, tmp_path: Path, nodes: int, processes: int) -> None:
    exact = ["--epochs", 2, "--dropout", 0, "--head-dropout", 0]
    train.main(train_options(tiny_encoder, small_data, tmp_path / "one", *exact))
    run, options = tmp_path / "job", job_options(tiny_encoder, small_data, *exact)

    file = tmp_path / "first.log"
    facts, log = wait_for_end(submit(file, nodes, processes, run, options), file)
    assert (facts["JobState"], facts["ExitCode"], facts["NumNodes"]) == ("COMPLETED", "0:0", str(nodes)), log
    assert "2 processes" in log
    assert "resume " not in log
    for line in ("encoder ", "step     14/14 ", "model "):
        assert len([said for said in log.splitlines() if said.startswith(line)]) == 1, f"only rank 0 speaks: {log}"
    assert len(losses(run)) == 14
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert metrics(run)[-1]["accuracy"] == metrics(tmp_path / "one")[-1]["accuracy"]

    before = metrics(run)
    file = tmp_path / "second.log"
    facts, log = wait_for_end(submit(file, nodes, processes, run, options), file)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert re.search(r"^resume +from .*step-00000014$", log, re.MULTILINE), log
    assert metrics(run) == before


def test_time_limit_requeues_and_ends_with_the_same_bits(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    options = ["--max-steps", 5000, "--log-every", 100, "--eval-every", 50]
    run, log = tmp_path / "job", tmp_path / "log"
    # Half a minute to a minute after its start the job gets its signal, long before it is done.
    job = submit(log, 2, 1, run, job_options(tiny_encoder, small_data, *options), "--signal=B:USR1@60")
    facts, said = wait_for_end(job, log, timeout_s=400)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), said
    assert int(facts["Restarts"]) >= 1, said
    assert said.count("the time limit is near") - int(facts["Restarts"]) in (0, 1), "once more as it ends"
    assert said.count("stopped    by SIGUSR1 after step ") == int(facts["Restarts"])
    # The same without SLURM or a stop.
    torchrun(2, train_options(tiny_encoder, small_data, tmp_path / "one", *options), nodes=True)
    assert digests(run) == digests(tmp_path / "one")
    assert logged(run) == logged(tmp_path / "one")


SLOW_SAVING = """
import os, pathlib, re, time
rename = pathlib.Path.rename
def slow_rename(self, target):
    if re.fullmatch("step-[0-9]{8}", pathlib.Path(target).name) and "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep(45)
    return rename(self, target)
pathlib.Path.rename = slow_rename
"""


def test_save_that_takes_longer_than_torchruns_patience(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    """torchrun kills its processes half a minute after SIGTERM, whatever time is left."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_SAVING, encoding="utf-8")
    lines = (small_data / "train.tsv").read_text(encoding="utf-8").splitlines()
    many = [lines[0], *lines[1:] * 4000]  # no epoch ends before the time limit, so nothing else is saved
    (small_data / "train.tsv").write_text("\n".join(many) + "\n", encoding="utf-8")
    run, log = tmp_path / "job", tmp_path / "log"
    options = job_options(tiny_encoder, small_data, "--log-every", 100)
    job = submit(log, 2, 1, run, options, "--signal=B:USR1@60", PYTHONPATH=f"{tmp_path}:{ROOT}")
    deadline = time.monotonic() + 200
    while (facts := job_facts(job))["JobState"] in UNFINISHED and facts["Restarts"] == "0":
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    said = log.read_text()
    assert facts["Restarts"] == "1", said
    assert "lost contact" not in said
    stopped = re.search(r"stopped    by SIGUSR1 after step (\d+), and saved", said)
    assert stopped, said
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step-{int(stopped[1]):08}"]
    call("scancel", job)
