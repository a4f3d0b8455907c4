"""A run that answers every text alike is noticed and ends, saved; healthy runs are left alone."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Capture, Patch, RunTrain, losses, metrics
from running import digests, logged, resume, state_of, stop_by_signal

from sst2_xlmr import run as run_module
from sst2_xlmr import train
from sst2_xlmr.training.guard import check_progress
from sst2_xlmr.training.state import TrainState

REASON = "same prediction for every text of dev: 'x'"
# So slow that the loss stays where it is; 9 steps of warm-up among 140.
STUCK = ["--max-steps", 140, "--batch-size", 2, "--lr", 1e-9, "--log-every", 10, "--eval-every", 0, "--save-every", 100]


def test_suspicion_waits_for_warm_up_and_asks_seldom() -> None:
    def is_suspicious(loss: float, warmup: int = 20, checked_step: int = 0) -> bool:
        state = TrainState(300, step=120, checked_step=checked_step)
        check_progress(state, loss, 80, 0.693, warmup)
        return state.collapse_check_due

    assert is_suspicious(0.69)
    assert not is_suspicious(0.67), "it learns"
    assert not is_suspicious(0.69, warmup=21)
    assert not is_suspicious(0.69, checked_step=21), "it was looked at"


def test_a_run_has_learned_once_its_loss_is_clearly_lower_and_that_is_kept() -> None:
    state = TrainState(10)
    # 0.60 of few rows may be chance
    for loss, rows, learned in ((0.65, 800, False), (0.60, 80, False), (0.60, 800, True), (0.70, 800, True)):
        check_progress(state, loss, rows, 0.693, 0)
        assert state.has_learned == learned


def test_a_collapsed_run_can_resume(run_train: RunTrain, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(run_module, "collapse_reason", lambda *_: REASON)
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="^1$"):
        run_train(run, *STUCK)
    said = capsys.readouterr().out.splitlines()
    assert f"step    110  collapsed: {REASON}" in said
    assert said[-2].startswith("collapsed  training has collapsed; the run is saved.")
    options = f"--config {run / 'config.json'} --lr 5e-10 --seed 1 --output-dir NEW_DIR"
    assert said[-1].endswith(options)
    assert metrics(run)[-1] == {"step": 110, "collapsed": True}
    state = state_of(run)
    assert (state.step, state.checked_step, state.collapse_check_due) == (110, 110, False)
    assert not (run / "model").exists()

    monkeypatch.setattr(run_module, "collapse_reason", lambda *_: "")
    resume(run)
    assert metrics(run)[-1]["step"] == 140
    assert digests(run) == digests(run_train(tmp_path / "whole", *STUCK)), "as if it had not ended"
    train.main([*options.replace("NEW_DIR", str(tmp_path / "again")).split(), "--max-steps", "2"])
    assert json.loads((tmp_path / "again" / "config.json").read_text())["seed"] == 1


def test_early_stopping_looks_first(run_train: RunTrain, tmp_path: Path, monkeypatch: Patch) -> None:
    """Its patience may be over before a collapse shows in the lines of metrics."""
    monkeypatch.setattr(run_module, "collapse_reason", lambda *_: REASON)
    stops = ["--eval-every", 1, "--early-stopping-patience", 3]
    with pytest.raises(SystemExit, match="^1$"):
        run_train(tmp_path / "run", *STUCK, *stops)
    last = metrics(tmp_path / "run")[-1]
    assert last["collapsed"] and last["step"] < 20


def test_a_run_stopped_before_a_look_resumes_with_it(run_train: RunTrain, tmp_path: Path, monkeypatch: Patch) -> None:
    """That it collapsed then is saved, so that it does not end there each time."""
    run = tmp_path / "run"
    stop_by_signal(110, "evaluate_split", lambda: run_train(run, *STUCK))
    assert (state_of(run).step, state_of(run).collapse_check_due) == (110, True)
    for reason, step in ((REASON, 110), ("", 140)):
        monkeypatch.setattr(run_module, "collapse_reason", lambda *_, reason=reason: reason)
        with contextlib.suppress(SystemExit):
            resume(run)
        assert logged(run)[-1]["step"] == step
        assert not state_of(run).collapse_check_due


@pytest.mark.parametrize("options", ["1", "3", "1 --freeze-encoder", "1 --class-weights 0.05,1"])
def test_a_slow_run_is_checked_and_goes_on(run_train: RunTrain, tmp_path: Path, options: str, capsys: Capture) -> None:
    """Its rate is too low for the loss to move, and every text gets the same label; few layers differ little."""
    run = run_train(tmp_path / "run", *STUCK, "--layers", *options.split())
    assert state_of(run).checked_step >= 110
    assert "collapsed" not in capsys.readouterr().out


@pytest.mark.parametrize("layers", [1, 3])
def test_a_collapsed_run_is_noticed(run_train: RunTrain, tmp_path: Path, monkeypatch: Patch, layers: int) -> None:
    """Its head no longer looks at the encoder, as it is with an output that is the same for all texts."""

    def collapse(run: train.Run) -> None:
        for parameter in run.model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(1e-6)
        real(run)

    real = train.train
    monkeypatch.setattr(train, "train", collapse)
    with pytest.raises(SystemExit, match="^1$"):
        run_train(tmp_path / "run", *STUCK, "--layers", layers)
    assert metrics(tmp_path / "run")[-1] == {"step": 110, "collapsed": True}


REGULAR = "--class-weights balanced --label-smoothing 0.3 --dropout 0.2 --head-dropout 0.5 --precision bf16"


@pytest.mark.parametrize("options", ["--lr 3e-4 --warmup-ratio 0.5 --epochs 1.8", "--freeze-encoder", REGULAR])
def test_healthy_runs(run_train: RunTrain, small_data: Path, tmp_path: Path, options: str, capsys: Capture) -> None:
    header, *rows = (small_data / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (small_data / "train.tsv").write_text(header + "".join(rows * 20), encoding="utf-8")
    run = run_train(tmp_path / "run", "--epochs", 2, "--log-every", 10, "--eval-every", 0, *options.split())
    assert "collapsed" not in capsys.readouterr().out
    found = losses(run)
    assert np.mean(found[-5:]) < 0.97 * found[0], "a run that does not learn would prove nothing"
