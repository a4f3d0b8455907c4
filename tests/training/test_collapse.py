"""A run that answers every text alike is noticed, begins again on request, and healthy runs are left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metrics, user_error
from running import digests

import train
from sst2_xlmr.training.checkpoint import find_checkpoint
from sst2_xlmr.training.collapse import answers_alike, constant_loss, is_suspicious
from sst2_xlmr.training.loss import sum_of_losses

RunTrain = Callable[..., Path]
# So slow that the loss stays where it is; 420 steps.
STUCK = ["--epochs", 60, "--lr", 1e-9, "--log-every", 10, "--eval-every", 0, "--save-every", 100]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 3.0, 1.0]])
def test_the_loss_of_a_constant_answer_is_the_least(smoothing: float, weights: list[float]) -> None:
    """Against many constant answers, with the loss that training has."""
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    least = constant_loss(labels, np.array(weights), smoothing)

    def loss(logits: torch.Tensor) -> float:
        rows = logits.expand(len(labels), 3)
        return float(sum_of_losses(rows, torch.from_numpy(labels), smoothing, torch.tensor(weights))) / len(labels)

    generator = torch.Generator().manual_seed(0)
    losses = [loss(torch.randn(3, generator=generator) * 2) for _ in range(3000)]
    assert least <= min(losses) + 1e-6
    assert least == pytest.approx(min(losses), rel=0.02)


def test_suspicion_waits_for_warm_up_and_asks_seldom() -> None:
    assert is_suspicious(0.69, 0.693, 100, 100)
    assert not is_suspicious(0.67, 0.693, 100, 100), "it learns"
    assert not is_suspicious(0.69, 0.693, 99, 100)
    assert not is_suspicious(0.69, 0.693, -5, 100)
    assert not is_suspicious(0.69, 0.693, 500, 99)


def answers(slope: float, share: float, rows: int = 872, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities near 0.6 for class 0, whose tiny differences follow the labels by `slope`."""
    random = np.random.RandomState(0)
    labels = (random.random_sample(rows) < share).astype(int)
    second = 0.4 + 1e-4 * (noise * random.normal(size=rows) + slope * labels)
    return np.stack([1 - second, second], 1).astype(np.float32), labels


def test_answers_are_alike_where_they_say_no_more_than_chance() -> None:
    assert answers_alike(*answers(0.0, 0.5))
    assert answers_alike(*answers(0.0, 0.5, noise=0.0)), "the same to the bit"
    assert answers_alike(*answers(0.3, 0.5)), "with a little that is no learning"
    assert not answers_alike(*answers(0.6, 0.5)), "it learns slowly"
    assert not answers_alike(*answers(1.0, 0.05)), "skewed classes: one label, but it ranks them"
    probabilities, labels = answers(0.0, 0.5)
    probabilities[0] = [0.3, 0.7]
    assert not answers_alike(probabilities, labels), "two labels"
    assert not answers_alike(probabilities[1:], np.zeros(871, int)), "dev has one class"


def once(result: bool) -> Callable[..., bool]:
    """Return what says `result` when it is first called, and False after that."""
    calls: list[None] = []

    def answer(*_: object) -> bool:
        calls.append(None)
        return result and len(calls) == 1

    return answer


def collapse_at_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "answers_alike", once(True))


def test_a_collapse_is_said_once_and_written(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "answers_alike", lambda *_: True)
    run = run_train(tmp_path / "run", *STUCK)
    said = [line for line in capsys.readouterr().out.splitlines() if "collapsed" in line]
    assert len(said) == 1
    assert said[0].startswith("step    130  collapsed: every text of dev gets the label '")
    assert said[0].endswith("lower --lr, now 1e-09, or let --restart-on-collapse N try again")
    assert [line["step"] for line in metrics(run) if line.get("collapsed")] == [130]
    assert metrics(run)[-1]["step"] == 420, "it trains on"


def test_it_begins_again_with_half_the_rate_and_another_seed(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    collapse_at_first_look(monkeypatch)
    run = run_train(tmp_path / "run", *STUCK, "--restart-on-collapse", 2)
    said = capsys.readouterr().out
    assert "beginning again with half the rate, 5e-10, and another seed, 1 of 2" in said
    assert json.loads((run / "restarts.json").read_text()) == [{"step": 130, "lr": 1e-9, "seed": 0}]
    first, *lines = metrics(run)
    assert first == {"step": 0, "restarts": 1, "collapsed": [{"step": 130, "lr": 1e-9, "seed": 0}]}
    steps = [line["step"] for line in lines if "split" not in line]
    assert steps == list(range(10, 421, 10)), "the lines of the first attempt are gone"
    assert max(line["lr"] for line in lines if "lr" in line) <= 5e-10
    assert "was begun again once, each time with half the rate" in (run / "model" / "README.md").read_text()
    saved = find_checkpoint(run / "checkpoints", pytest.fail)
    assert saved is not None and json.loads((saved / "progress.json").read_text())["restarts"] == 1
    config = json.loads((run / "config.json").read_text())
    assert (config["lr"], config["seed"]) == (1e-9, 0), "as asked for"


def test_a_collapsed_run_begins_again_once_it_is_told_to(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its message says; at the next look."""
    monkeypatch.setattr(train, "answers_alike", lambda *_: True)
    run = run_train(tmp_path / "run", *STUCK, "--keep-checkpoints", 100)
    shutil.rmtree(run / "model")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > 400:
            shutil.rmtree(checkpoint)
    monkeypatch.setattr(train, "answers_alike", once(True))
    train.main(["--resume", "--output-dir", str(run), "--restart-on-collapse", "1"])
    assert [attempt["step"] for attempt in json.loads((run / "restarts.json").read_text())] == [410]
    assert metrics(run)[-1]["step"] == 420


def test_a_lost_list_of_attempts_costs_no_checkpoint(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    collapse_at_first_look(monkeypatch)
    run = run_train(tmp_path / "run", *STUCK, "--restart-on-collapse", 1)
    saved = sorted(each.name for each in (run / "checkpoints").iterdir())
    for content, says in ((None, "is of a later attempt than restarts.json says"), ("{", "cannot read")):
        if content is None:
            (run / "restarts.json").unlink()
        else:
            (run / "restarts.json").write_text(content)
        line = user_error(lambda: train.main(["--resume", "--output-dir", str(run)]), capsys)
        assert says in line
        assert sorted(each.name for each in (run / "checkpoints").iterdir()) == saved


@pytest.mark.parametrize(
    "stop", [pytest.param(0, marks=pytest.mark.slow), 100, pytest.param(300, marks=pytest.mark.slow)]
)
def test_a_second_attempt_resumes_to_the_bit(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Killed after a checkpoint of the second attempt, or before its first, with those of the first attempt there."""
    collapse_at_first_look(monkeypatch)
    run = run_train(tmp_path / "run", *STUCK, "--restart-on-collapse", 1, "--keep-checkpoints", 100)
    whole, lines = digests(run), [line for line in metrics(run) if "split" in line or "restarts" in line]
    shutil.rmtree(run / "model")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > stop:
            shutil.rmtree(checkpoint)
    other = run_train(tmp_path / "other", *STUCK[:-2], "--max-steps", 7, "--save-every", 5)
    stale = run / "checkpoints" / "step-00000400"  # of the first attempt, had the process died at the worst moment
    shutil.copytree(other / "checkpoints" / "step-00000005", stale)
    monkeypatch.setattr(train, "answers_alike", lambda *_: False)
    train.main(["--resume", "--output-dir", str(run)])
    assert digests(run) == whole
    assert [line for line in metrics(run) if "split" in line or "restarts" in line] == lines


@pytest.mark.parametrize(
    "options",
    [
        ["--lr", 1e-3],
        ["--lr", 3e-4, "--warmup-ratio", 0.5],
        ["--freeze-encoder", "--lr", 1e-3],
        ["--class-weights", "balanced"],
        ["--label-smoothing", 0.3],
        ["--dropout", 0.2, "--head-dropout", 0.5],
        ["--micro-batch-size", 2],
        ["--precision", "bf16"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_healthy_runs_are_left_alone(
    run_train: RunTrain, tmp_path: Path, options: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_train(tmp_path / "run", "--epochs", 45, "--log-every", 10, "--eval-every", 0, *options)
    assert "collapsed" not in capsys.readouterr().out
    lines = metrics(run)
    assert not [line for line in lines if "collapsed" in line]
    losses = [line["loss"] for line in lines if "split" not in line]
    assert np.mean(losses[-5:]) < 0.97 * losses[0], "a run that does not learn would prove nothing"
