"""A start that dies, at any point of it, leaves a folder that the same command or --resume accepts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, metrics, train_options, user_error

from sst2_xlmr import __version__, train
from sst2_xlmr.config import Config
from sst2_xlmr.training.run_folder import claim, write_config
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import SCRATCH_MARK, scratch_name

MINOR = __version__.rpartition(".")[0]
# Where a start is killed: before `target` is called.
KILLED = """
import os, pkgutil, signal, sys
from sst2_xlmr import train

module, _, function = sys.argv[1].rpartition(".")
setattr(pkgutil.resolve_name(module), function, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
train.main(sys.argv[2:])
"""
PLACES = {  # -> what the run's folder then holds
    "sst2_xlmr.training.run_folder.write_text": {".lock"},
    "sst2_xlmr.train.outputs": {".lock", "config.json"},
    "sst2_xlmr.report.tensorboard.SummaryWriter": {".lock", "config.json", "metrics.jsonl"},
    "sst2_xlmr.training.checkpoint.write_tensors": {".lock", "config.json", "metrics.jsonl", "checkpoints"},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_start_can_be_made_again(tiny_encoder: Path, small_data: Path, tmp_path: Path, place: str) -> None:
    run = tmp_path / "run"
    command = train_options(tiny_encoder, small_data, run, "--epochs", 1, "--save-every", 3)
    command += ["--tensorboard-dir", str(tmp_path / "events")] if "tensorboard" in place else []
    killed = subprocess.run([sys.executable, "-c", KILLED, place, *command], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert {file.name for file in run.iterdir()} - {"tensorboard"} == PLACES[place]
    # As scripts/train.sbatch decides it.
    train.main([*(["--resume"] if (run / "config.json").exists() else []), *command])
    assert [entry["step"] for entry in metrics(run) if "split" not in entry] == list(range(1, 8))


def test_a_start_killed_while_it_wrote_its_config(run_train: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").write_text("process 1 on a node that is gone\n")
    scratch_name(run / "config.json").write_text('{"enco')
    run_train(run, "--epochs", 1)
    assert not list(run.glob(f"*{SCRATCH_MARK}"))


def test_a_folder_with_anything_else_is_refused(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").touch()
    with pytest.raises(UserError, match="already exists"):
        train.main(train_options(tiny_encoder, small_data, run))
    assert [file.name for file in run.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("version", [None, "0.1.9", "1.2.0", f"{MINOR}.99"])
def test_a_run_of_another_version_is_refused_but_its_options_are_taken(
    run_train: Callable[..., Path], tmp_path: Path, version: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_train(tmp_path / "run", "--max-steps", 2)
    saved = json.loads((run / "config.json").read_text())
    assert saved.pop("sst2_xlmr") == __version__
    (run / "config.json").write_text(json.dumps({**({"sst2_xlmr": version} if version else {}), **saved}))
    resume = ["--resume", "--output-dir", str(run)]
    if version == f"{MINOR}.99":
        train.main(resume)
        assert json.loads((run / "config.json").read_text())["sst2_xlmr"] == __version__
    else:
        line = user_error(lambda: train.main(resume), capsys)
        assert f"the run in {run} is of version {version or 'before 0.2'}, this is {__version__}: " in line
        assert f"start a new one by --config {run / 'config.json'} --output-dir NEW_DIR" in line
    train.main(["--config", str(run / "config.json"), "--output-dir", str(tmp_path / "new")])


def test_a_new_run_overwrites_no_config(tmp_path: Path) -> None:
    """Two starts that both found the folder free: the second comes when the first has ended."""
    with claim(tmp_path):
        write_config(tmp_path, Config(), is_new=True)
        with pytest.raises(UserError, match="already exists; continue it with --resume or choose"):
            write_config(tmp_path, Config(), is_new=True)
        write_config(tmp_path, Config(), is_new=False)
