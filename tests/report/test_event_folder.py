"""An event folder belongs to one run: nobody else writes to it, or cuts what is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import metrics, user_error
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sst2_xlmr import train

RunTrain = Callable[..., Path]
OPTIONS = ("--epochs", 1, "--save-every", 3, "--keep-checkpoints", 100)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def logged_steps(folder: Path) -> list[int]:
    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]


def go_back(run: Path, step: int) -> None:
    """Remove the checkpoints after a step, as if the run had been killed there."""
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)


def resume(run: Path, *options: object) -> None:
    train.main(["--resume", "--output-dir", str(run), *map(str, options)])


def test_a_new_run_takes_no_folder_with_events(
    run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*OPTIONS, "--tensorboard-dir", tmp_path / "events"]
    run_train(tmp_path / "one", *options)
    line = user_error(lambda: run_train(tmp_path / "two", *options), capsys)
    assert "events has events of another run; take another folder" in line
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("is_own", [True, False], ids=["in the other run's folder", "named by the other run"])
def test_a_resumed_run_cuts_no_other_runs_events(
    run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_own: bool
) -> None:
    options = OPTIONS if is_own else (*OPTIONS, "--tensorboard-dir", tmp_path / "events")
    one, two = run_train(tmp_path / "one", *options), run_train(tmp_path / "two", *OPTIONS)
    events = one / "tensorboard" if is_own else tmp_path / "events"
    before, config = content(events), (two / "config.json").read_bytes()
    go_back(two, 3)
    line = user_error(lambda: resume(two, "--tensorboard-dir", events), capsys)
    assert f"{events} " in line
    assert content(events) == before
    assert (two / "config.json").read_bytes() == config
    resume(two)
    assert logged_steps(two / "tensorboard") == list(range(1, 8))


def test_a_copied_run_cuts_no_events_of_its_original(
    run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run_train(tmp_path / "one", *OPTIONS, "--tensorboard-dir", tmp_path / "events")
    two = tmp_path / "two"
    shutil.copytree(one, two)
    go_back(two, 3)
    before = content(tmp_path / "events")
    line = user_error(lambda: resume(two), capsys)
    assert f"events belongs to the run in {one} (run.txt says so); take another --tensorboard-dir" in line
    assert content(tmp_path / "events") == before
    resume(two, "--tensorboard-dir", tmp_path / "more")
    assert logged_steps(tmp_path / "more") == [4, 5, 6, 7]
    assert [entry["step"] for entry in metrics(two) if "split" not in entry] == list(range(1, 8))


def test_two_starts_at_the_same_time_share_no_folder(
    run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find it without events; the one that names itself first has it."""
    events, options = tmp_path / "events", [*OPTIONS, "--tensorboard-dir", tmp_path / "events"]
    with monkeypatch.context() as patched:
        patched.setattr("sst2_xlmr.report.console.SummaryWriter", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            run_train(tmp_path / "one", *options)
    assert list(content(events)) == ["run.txt"]
    assert "belongs to the run in" in user_error(lambda: run_train(tmp_path / "two", *options), capsys)
    assert not (tmp_path / "two").exists()
    resume(tmp_path / "one")
    assert logged_steps(events) == list(range(1, 8))


def test_a_run_may_change_its_folder_and_return(run_train: RunTrain, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run = run_train(tmp_path / "run", *OPTIONS, "--tensorboard-dir", first)
    go_back(run, 3)
    resume(run, "--tensorboard-dir", second)
    assert logged_steps(first) == list(range(1, 8))
    assert logged_steps(second) == [4, 5, 6, 7]
    for _ in range(2):
        go_back(run, 6)
        resume(run, "--tensorboard-dir", first)
        assert logged_steps(first) == list(range(1, 8))
    go_back(run, 0)
    resume(run, "--tensorboard-dir", run / "tensorboard")
    assert logged_steps(run / "tensorboard") == list(range(1, 8))
