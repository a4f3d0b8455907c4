"""A start that dies, at any point of it, leaves a folder that the same command or --resume accepts."""

from __future__ import annotations

import json
import multiprocessing
import os
import pkgutil
import signal
from pathlib import Path

import pytest
from conftest import Capture, RunTrain, metrics, train_options, user_error
from running import resume

from sst2_xlmr import __version__, train
from sst2_xlmr.config import Config
from sst2_xlmr.training.run_folder import claim, write_config
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import is_scratch, scratch_name

MINOR = __version__.rpartition(".")[0]
PLACES = {  # where a start is killed: before this is called -> what the run's folder then holds
    "sst2_xlmr.training.run_folder.write_text": {".lock"},
    "sst2_xlmr.train.open_report": {".lock", "config.json"},
    "sst2_xlmr.report.tensorboard.SummaryWriter": {".lock", "config.json", "metrics.jsonl"},
    "sst2_xlmr.training.checkpoint.write_tensors": {".lock", "config.json", "metrics.jsonl", "checkpoints"},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_start_can_be_made_again(tiny_encoder: Path, small_data: Path, tmp_path: Path, place: str) -> None:
    run = tmp_path / "run"
    command = train_options(tiny_encoder, small_data, run, "--epochs", 1, "--save-every", 3)
    command += ["--tensorboard-dir", str(tmp_path / "events")] if "tensorboard" in place else []

    def start_and_be_killed() -> None:
        module, _, function = place.rpartition(".")
        setattr(pkgutil.resolve_name(module), function, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        train.main(command)

    process = multiprocessing.get_context("fork").Process(target=start_and_be_killed, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    scratch_name(run / "config.json").write_text('{"enco')
    assert {file.name for file in run.iterdir() if not is_scratch(file)} - {"tensorboard"} == PLACES[place]
    # As scripts/train.sbatch decides it.
    train.main([*(["--resume"] if (run / "config.json").exists() else []), *command])
    assert [entry["step"] for entry in metrics(run) if "split" not in entry] == list(range(1, 8))
    assert not any(map(is_scratch, run.iterdir()))


def test_a_run_of_another_version_is_refused_but_its_options_are_taken(
    run_train: RunTrain, tmp_path: Path, capsys: Capture
) -> None:
    run = run_train(tmp_path / "run", "--max-steps", 2)
    config = run / "config.json"
    saved = json.loads(config.read_text())
    assert saved.pop("sst2_xlmr") == __version__
    for version in (None, "0.1.9", "1.2.0"):
        config.write_text(json.dumps({**({"sst2_xlmr": version} if version else {}), **saved}))
        line = user_error(lambda: resume(run), capsys)
        assert f"version {version or 'before 0.2'} wrote the run in {run}, and this is {__version__}: resume it" in line
        assert f"start over with --config {config} --output-dir NEW_DIR" in line
    train.main(["--config", str(config), "--output-dir", str(tmp_path / "new")])
    config.write_text(json.dumps({"sst2_xlmr": f"{MINOR}.99", **saved}))
    resume(run)
    assert json.loads(config.read_text())["sst2_xlmr"] == __version__


def test_a_new_run_overwrites_no_config(tmp_path: Path) -> None:
    """Two starts that both found the folder free: the second comes when the first has ended."""
    with claim(tmp_path):
        write_config(tmp_path, Config(), is_new=True)
        with pytest.raises(UserError, match="already exists; continue it with --resume or choose"):
            write_config(tmp_path, Config(), is_new=True)
        write_config(tmp_path, Config(), is_new=False)
