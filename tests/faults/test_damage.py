"""Damaged checkpoints, full and read-only disks, a folder that is in use: what was whole stays whole, and is used."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, train_options, user_error
from running import digests, last_step, launcher, logged, started, wait_for

from sst2_xlmr import train
from sst2_xlmr.training.checkpoint import find_checkpoint, what_is_damaged
from sst2_xlmr.util.files import SCRATCH_MARK, scratch_name

RunTrain = Callable[..., Path]
FILES = ["manifest.json", "state.json", "config.json"]
FILES += [f"{name}.safetensors" for name in ("model", "optimizer", "random", "vocabulary")]


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("file", FILES)
def test_damaged_checkpoint_is_named_and_the_one_before_used(
    file: str, run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file deleted, truncated, emptied, or with a flipped bit in its first, middle and last byte."""
    whole = run_train(tmp_path / "whole", "--epochs", 2, "--save-every", 5)
    ways: list[tuple[str, Callable[[Path], object]]] = [
        ("deleted", Path.unlink),
        ("truncated", truncate),
        ("emptied", lambda path: os.truncate(path, 0)),
        ("first byte", lambda path: flip(path, 0)),
        ("middle byte", lambda path: flip(path, path.stat().st_size // 2)),
        ("last byte", lambda path: flip(path, -1)),
    ]
    for name, damage in ways:
        broken = Path(shutil.copytree(whole, tmp_path / name))
        damage(broken / "checkpoints" / "step-00000014" / file)
        capsys.readouterr()
        train.main(["--resume", "--output-dir", str(broken)])
        said = capsys.readouterr().out
        assert f"{broken / 'checkpoints' / 'step-00000014'} is damaged ({file} " in said, name
        assert f"resume     from {broken / 'checkpoints' / 'step-00000010'}" in said, name
        assert digests(broken) == digests(whole), name


def test_every_byte_of_a_manifest_matters(run_train: RunTrain, tmp_path: Path) -> None:
    checkpoint = run_train(tmp_path / "run", "--epochs", 1) / "checkpoints" / "step-00000007"
    size = (checkpoint / "manifest.json").stat().st_size
    for at in range(0, size, 7):
        flip(checkpoint / "manifest.json", at)
        assert what_is_damaged(checkpoint), f"byte {at} of {size}"
        flip(checkpoint / "manifest.json", at)
    assert not what_is_damaged(checkpoint)


def test_no_checkpoint_left_means_from_the_beginning(
    run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_train(tmp_path / "run", "--epochs", 2)
    before = digests(run)
    for checkpoint in (run / "checkpoints").iterdir():
        truncate(checkpoint / "optimizer.safetensors")
    train.main(["--resume", "--output-dir", str(run)])
    said = capsys.readouterr().out
    assert said.count("is damaged (optimizer.safetensors has ") == 2
    assert "no checkpoint yet: from the beginning" in said
    assert digests(run) == before


def test_killed_between_two_renames_keeps_the_best_model(run_train: RunTrain, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--epochs", 2)
    before = digests(run)
    (run / "best").rename(scratch_name(run / "best", "old"))
    half = scratch_name(run / "checkpoints" / "step-00000020")
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    train.main(["--resume", "--output-dir", str(run)])
    assert digests(run) == before
    assert {entry.name for entry in run.iterdir()} == {
        *(".lock", "best", "checkpoints", "config.json", "metrics.jsonl", "model", "tensorboard"),
    }


def run_until_it_fails(words: list[str], limit_bytes: int | None = None) -> str:
    """Run train.py, which must end with status 2 and one line on stderr; returns that line."""

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, "train.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=limit, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: cannot write "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_quota_ends_with_one_line_and_nothing_half_written(
    tiny_encoder: Path, small_data: Path, tmp_path: Path
) -> None:
    """A limit on the size of a file, which is less than the moments need."""
    options = train_options(tiny_encoder, small_data, tmp_path / "run", "--epochs", 1, "--save-every", 3)
    line = run_until_it_fails(options, limit_bytes=250_000)
    assert "step-00000003: File too large; make room, then continue (training: with --resume)" in line
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB, if this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk_leaves_the_checkpoints_before_whole(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, small_disk: Path
) -> None:
    options = ["--epochs", 2, "--save-every", 3]
    train.main(train_options(tiny_encoder, small_data, tmp_path / "whole", *options))
    line = run_until_it_fails(train_options(tiny_encoder, small_data, small_disk / "run", *options))
    assert "No space left on device; make room, then continue (training: with --resume)" in line
    found = find_checkpoint(small_disk / "run" / "checkpoints", pytest.fail)
    assert found is not None
    assert not list((small_disk / "run").rglob(f"*{SCRATCH_MARK}"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    train.main(["--resume", "--output-dir", str(small_disk / "run")])
    assert digests(small_disk / "run") == digests(tmp_path / "whole")
    assert logged(small_disk / "run") == logged(tmp_path / "whole")


def test_encoder_that_goes_away_costs_no_step(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The untrained rows of the table are read again when a model is written, and all of it to look for a collapse."""
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    encoder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    options = ["--max-steps", 1000, "--eval-every", 1000, "--save-every", 1000, "--batch-size", 1]
    lines = (small_data / "train.tsv").read_text(encoding="utf-8").splitlines()
    (small_data / "train.tsv").write_text("\n".join([lines[0], *lines[1:] * 25]) + "\n", encoding="utf-8")
    with started([*launcher(1), "train.py", *train_options(encoder, small_data, run, *options)], log) as process:
        wait_for(log, "step ", process)
        encoder.rename(tmp_path / "away")
        assert process.wait(timeout=60) == 2, log.read_text()
    assert "model.safetensors: it no longer exists" in log.read_text()
    assert (run / "checkpoints" / f"step-{last_step(run):08d}").is_dir()
    (tmp_path / "away").rename(encoder)
    train.main(["--resume", "--output-dir", str(run)])
    train.main(train_options(encoder, small_data, whole, *options))
    assert digests(run) == digests(whole)
    assert logged(run) == logged(whole)


def test_folder_that_becomes_read_only(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = train_options(tiny_encoder, small_data, run, "--max-steps", 2000, "--save-every", 50)
    with started([*launcher(1), "train.py", *words], log) as process:
        wait_for(log, "checkpoint: ", process, times=2)
        folder = str(run / "checkpoints")
        if os.geteuid() == 0:  # whom permissions do not stop
            bind = subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False)
            if bind.returncode:
                pytest.skip("this user may not mount a file system")
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        else:
            (run / "checkpoints").chmod(0o555)
        try:
            assert process.wait(timeout=60) == 2, log.read_text()
            assert find_checkpoint(run / "checkpoints", pytest.fail) is not None
        finally:
            if os.geteuid() == 0:
                subprocess.run(["umount", "--lazy", folder], check=True)
            else:
                (run / "checkpoints").chmod(0o755)
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "cannot write the checkpoint" in errors[0]
    assert "Traceback" not in log.read_text()


def test_second_job_on_a_run_is_refused(
    run_train: RunTrain, tiny_encoder: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = train_options(tiny_encoder, small_data, run, "--max-steps", 3000, "--save-every", 50)
    with started([*launcher(1), "train.py", *words], log) as process:
        wait_for(log, "checkpoint: ", process)
        line = user_error(lambda: train.main(["--resume", "--output-dir", str(run)]), capsys)
        assert f"{run} is in use by process {process.pid} on " in line
        before = (run / "config.json").read_bytes()
        wait_for(log, "checkpoint: ", process, times=log.read_text().count("checkpoint: ") + 2)
        assert (run / "config.json").read_bytes() == before
    time.sleep(0.1)
    # The lock went with the process.
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "max_steps": 60}))
    for checkpoint in (run / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    train.main(["--resume", "--output-dir", str(run)])
    assert "after step 60" in capsys.readouterr().out
