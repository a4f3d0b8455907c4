"""A run that answers every text alike is noticed, begins again on request, and healthy runs are left alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metrics, user_error
from running import digests

from sst2_xlmr import train
from sst2_xlmr.training.checkpoint import find_checkpoint
from sst2_xlmr.training.guard import beats_constant, is_suspicious, why_collapsed
from sst2_xlmr.training.loss import constant_loss, sum_of_losses
from sst2_xlmr.training.state import Progress

RunTrain = Callable[..., Path]
WHY = "every text of dev gets the label 'x', with the same probability"
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
    progress = Progress("", "", 300, step=120)
    assert is_suspicious(0.69, 0.693, 100, progress)
    assert not is_suspicious(0.67, 0.693, 100, progress), "it learns"
    assert not is_suspicious(0.69, 0.693, 99, progress)
    assert not is_suspicious(0.69, 0.693, -5, progress)
    assert not is_suspicious(0.69, 0.693, 100, dataclasses.replace(progress, checked_step=21)), "it was looked at"
    assert not is_suspicious(0.69, 0.693, 100, dataclasses.replace(progress, collapsed_step=10)), "it was said"


def answers(deviation: float, classes: int = 2, rows: int = 872) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities whose logits, 0.4 for the first class, deviate at random from text to text."""
    random = np.random.RandomState(0)
    logits = deviation * random.normal(size=(rows, classes))
    logits[:, 0] += 0.4
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities.astype(np.float32), random.randint(classes, size=rows)


@pytest.mark.parametrize("classes", [2, 77])
def test_answers_that_do_not_depend_on_the_text(classes: int) -> None:
    names = [f"class {number}" for number in range(classes)]

    def alike(probabilities: np.ndarray, labels: np.ndarray) -> bool:
        return "'class 0', with the same probability" in why_collapsed(probabilities, labels, False, names)

    assert alike(*answers(0.0, classes)), "the same to the bit"
    assert alike(*answers(1e-3, classes)), "rounding of bf16, a little of a text's length"
    assert not alike(*answers(0.008, classes)), "a new head on a pretrained encoder"
    probabilities, labels = answers(1e-3, classes)
    probabilities[0] = np.roll(probabilities[0], 1)
    assert not alike(probabilities, labels), "two labels"
    assert not alike(probabilities[1:], np.zeros(871, int)), "dev has one class"
    assert alike(np.eye(classes)[np.zeros(872, int)], labels), "probabilities of 0"


def test_answers_that_have_become_useless() -> None:
    def useless(accuracy: float, sure: float, share: float = 0.5, had_learned: bool = True) -> bool:
        """Answers right in that share of the rows, with that probability for the label; the other rows wrong."""
        labels = (np.arange(1000) < 1000 * share).astype(int)
        is_right = np.random.RandomState(0).random_sample(1000) < accuracy
        answered = np.where(is_right, labels, 1 - labels)
        probabilities = np.full((1000, 2), 1 - sure)
        probabilities[np.arange(1000), answered] = sure
        return "had learned" in why_collapsed(probabilities, labels, had_learned, ["bad", "good"])

    assert useless(0.52, 0.55)
    assert not useless(0.52, 0.55, had_learned=False), "a slow beginning"
    assert not useless(0.70, 0.70), "it is better than chance"
    assert not useless(0.85, 0.999), "overfitted: a high loss, but right"
    assert useless(0.95, 0.999, share=0.05), "so is always the frequent label"


def test_a_run_has_learned_once_its_loss_is_clearly_lower() -> None:
    assert beats_constant(0.60, 800, 0.693)
    assert not beats_constant(0.65, 800, 0.693)
    assert not beats_constant(0.60, 80, 0.693), "of few rows, it may be chance"


def once(result: str) -> Callable[..., str]:
    """Return what says `result` when it is first called, and nothing after that."""
    calls: list[None] = []

    def answer(*_: object) -> str:
        calls.append(None)
        return result if len(calls) == 1 else ""

    return answer


def collapse_at_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "why_collapsed", once(WHY))


def test_a_collapse_is_said_once_and_written(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "why_collapsed", lambda *_: WHY)
    run = run_train(tmp_path / "run", *STUCK)
    said = [line for line in capsys.readouterr().out.splitlines() if "  collapsed: " in line]
    assert len(said) == 1
    assert said[0].startswith(f"step    130  collapsed: {WHY}; ")
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


def test_a_finished_run_that_collapsed_begins_again_once_it_is_told_to(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the command that it ends with."""
    monkeypatch.setattr(train, "why_collapsed", lambda *_: WHY)
    run = run_train(tmp_path / "run", *STUCK)
    assert f"train.py --resume --output-dir {run} --restart-on-collapse 3" in capsys.readouterr().out
    assert "At step 130 the run had collapsed" in (run / "model" / "README.md").read_text()
    monkeypatch.setattr(train, "why_collapsed", once(WHY))
    train.main(["--resume", "--output-dir", str(run), "--restart-on-collapse", "3"])
    assert [attempt["step"] for attempt in json.loads((run / "restarts.json").read_text())] == [420]
    assert metrics(run)[-1]["step"] == 420
    assert "had collapsed" not in (run / "model" / "README.md").read_text()
    assert "collapsed  at step" not in capsys.readouterr().out


def test_a_finished_run_that_has_recovered_is_left_as_it_is(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collapse_at_first_look(monkeypatch)
    run = run_train(tmp_path / "run", *STUCK)
    train.main(["--resume", "--output-dir", str(run), "--restart-on-collapse", "3"])
    assert not (run / "restarts.json").exists()


def test_early_stopping_looks_first(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its patience may be over before a collapse shows in the lines of metrics."""
    collapse_at_first_look(monkeypatch)
    stops = ["--eval-every", 1, "--early-stopping-patience", 3]
    run = run_train(tmp_path / "run", *STUCK, *stops, "--restart-on-collapse", 1)
    assert [attempt["step"] for attempt in json.loads((run / "restarts.json").read_text())] == [4]
    assert "stopped early" in capsys.readouterr().out, "the second attempt"


def test_a_run_stopped_at_a_look_resumes_with_it(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had not been stopped."""
    looked: list[int] = []

    def stop_at_first_look(run: train.Run, outputs: train.Outputs) -> bool:
        looked.append(run.state.progress.step)
        return len(looked) > 1 and look(run, outputs)

    look = train.look_for_collapse
    monkeypatch.setattr(train, "look_for_collapse", stop_at_first_look)
    monkeypatch.setattr(train, "finish", lambda *_: None)
    run = run_train(tmp_path / "run", *STUCK, "--restart-on-collapse", 1)
    collapse_at_first_look(monkeypatch)
    train.main(["--resume", "--output-dir", str(run)])
    assert looked[:2] == [130, 130]
    assert [attempt["step"] for attempt in json.loads((run / "restarts.json").read_text())] == [130]


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
    monkeypatch.setattr(train, "why_collapsed", lambda *_: "")
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
    losses = [line["loss"] for line in lines if "split" not in line]
    assert np.mean(losses[-5:]) < 0.97 * losses[0], "a run that does not learn would prove nothing"


@pytest.mark.parametrize("options", [[], ["--freeze-encoder"], ["--class-weights", "0.05,1"]], ids=" ".join)
def test_a_run_that_is_merely_slow_is_looked_at_and_left_alone(
    run_train: RunTrain, tmp_path: Path, options: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rate is too low for the loss to move, and every text gets the same label."""
    run = run_train(tmp_path / "run", *STUCK, *options)
    saved = find_checkpoint(run / "checkpoints", pytest.fail)
    assert saved is not None and json.loads((saved / "progress.json").read_text())["checked_step"] >= 130
    assert metrics(run)[-1]["accuracy"] == pytest.approx(0.5, abs=0.1)
    assert "collapsed" not in capsys.readouterr().out
