"""Damaged checkpoints, full and read-only disks, a folder that is in use: what was whole stays whole, and is used."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import Capture, Patch, RunTrain, Words, change_json, file_size_limit, user_error
from running import at_step, digests, forked, logged, resume, wait_for

from sst2_xlmr.training.checkpoint import find_checkpoint, find_damage
from sst2_xlmr.util.files import SCRATCH_MARK


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def test_damage_to_any_file_of_a_checkpoint_is_named(finished_run: Path, tmp_path: Path) -> None:
    """Each file deleted, truncated, or with a flipped bit in its first, middle and last byte."""
    whole = finished_run / "checkpoints" / "step-00000014"
    ways: list[Callable[[Path], object]] = [
        Path.unlink,
        truncate,
        *(lambda path, share=share: flip(path, int(share * (path.stat().st_size - 1))) for share in (0, 0.5, 1)),
    ]
    names = sorted(file.name for file in whole.iterdir())
    assert len(names) == 7
    for number, damage in enumerate(ways):
        for name in names:
            broken = Path(shutil.copytree(whole, tmp_path / f"{number}-{name}"))
            damage(broken / name)
            assert find_damage(broken).startswith(f"{name} ")
    manifest = broken / "manifest.json"
    for at in range(0, manifest.stat().st_size, 7):
        shutil.copy(whole / "manifest.json", manifest)
        flip(manifest, at)
        assert find_damage(broken), f"byte {at}"
    assert not find_damage(whole)


def test_the_checkpoint_before_a_damaged_one_is_used(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    checkpoints = [run / "checkpoints" / f"step-{step:08}" for step in (14, 12)]
    truncate(checkpoints[0] / "optimizer.safetensors")
    resume(run)
    said = capsys.readouterr().out
    assert f"{checkpoints[0]} is damaged (optimizer.safetensors has " in said
    assert f"resume     from {checkpoints[1]}" in said
    assert digests(run) == digests(finished_run)
    for checkpoint in checkpoints:
        truncate(checkpoint / "optimizer.safetensors")
    resume(run)
    assert "no checkpoint yet: from the beginning" in capsys.readouterr().out
    assert digests(run) == digests(finished_run)


def test_damaged_checkpoints_of_later_steps_displace_none(
    finished_run: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Not even if they have the right sizes."""
    found: list[Path | None] = []

    def look(run: Any) -> None:
        run.background_writer.wait()
        found.append(find_checkpoint(run.folder / "checkpoints", str))

    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for checkpoint in (run / "checkpoints").iterdir():
        flip(checkpoint / "optimizer.safetensors", -1)
    at_step(monkeypatch, 5, look)
    resume(run)
    assert found == [run / "checkpoints" / "step-00000003"]
    assert digests(run) == digests(finished_run)


def test_full_disk_harms_nothing(run_train: RunTrain, finished_run: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """A limit on the size of a file, less than the moments need, which comes after the first checkpoint."""
    run = tmp_path / "run"
    with contextlib.ExitStack() as limits, monkeypatch.context() as patch:
        limit = file_size_limit(250_000)
        at_step(patch, 5, lambda run: (run.background_writer.wait(), limits.enter_context(limit)))
        line = user_error(run_train, run, "--epochs", 2, "--save-every", 3)
    assert "step-00000006: File too large; free some space, then continue (training: with --resume)" in line
    assert [checkpoint.name for checkpoint in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert not list(run.rglob(f"*{SCRATCH_MARK}"))
    resume(run)
    assert (digests(run), logged(run)) == (digests(finished_run), logged(finished_run))


def test_encoder_that_goes_away_costs_no_step(
    run_train: RunTrain, finished_run: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The untrained rows of the table are read again when a model is written."""
    run, encoder = tmp_path / "run", Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda _: encoder.rename(tmp_path / "away"))
        line = user_error(run_train, run, "--encoder", encoder, "--epochs", 2, "--save-every", 3)
    assert "model.safetensors: No such file" in line
    assert (run / "checkpoints" / "step-00000007").is_dir()
    (tmp_path / "away").rename(encoder)
    resume(run)
    assert (digests(run), logged(run)) == (digests(finished_run), logged(finished_run))


def test_second_job_on_a_run_is_refused(train_words: Words, tmp_path: Path, capsys: Capture) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = train_words(run, "--max-steps", 5000, "--save-every", 20)
    with forked(["train.py", *words], log) as process:
        wait_for(log, "checkpoint: ", process)
        before = (run / "config.json").read_bytes()
        assert f"{run} is in use by process {process.pid} on " in user_error(resume, run)
        wait_for(log, "checkpoint: ", process, times=log.read_text().count("checkpoint: ") + 2)
        assert (run / "config.json").read_bytes() == before
    change_json(run / "config.json", max_steps=10)
    shutil.rmtree(run / "checkpoints")
    resume(run)
    assert "after step 10" in capsys.readouterr().out
