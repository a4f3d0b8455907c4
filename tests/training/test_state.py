"""Where a run is: position, best evaluation, skipped batches; and what a resumed run must share with its beginning."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SAMPLE_DATA, Capture, Patch, RunTrain, kernels_for, losses, metrics, user_error
from running import digests, forget_after, logged, resume, state_of, stop_by_signal

from sst2_xlmr import train
from sst2_xlmr.training.state import TrainState


@pytest.mark.parametrize(
    ("precision", "begins", "ends"), [("fp32", "--compile", "--no-compile"), ("bf16", "--no-compile", "--compile")]
)
def test_plain_pytorch_and_the_engine_resume_each_other(
    run_train: RunTrain, tmp_path: Path, precision: str, begins: str, ends: str, capsys: Capture
) -> None:
    """16 steps without dropout: losses within 1e-5 in fp32; in bf16 they round at other places."""
    kernels_for(torch.float32)
    options = ["--dropout", 0, "--head-dropout", 0, "--precision", precision, "--max-steps", 16, "--save-every", 8]
    near = 1e-5 if precision == "fp32" else 3e-2
    run = run_train(tmp_path / "run", *options, "--keep-checkpoints", 9, begins)
    whole = run_train(tmp_path / "whole", *options, ends)
    assert losses(run) == pytest.approx(losses(whole), abs=near)
    forget_after(run, 8)
    capsys.readouterr()
    resume(run, ends)
    assert ("; engine" in capsys.readouterr().out) == (ends == "--compile")
    assert losses(run) == pytest.approx(losses(whole), abs=near)


CHANGES = {  # of what a run reads: the file, from where on from its end, and its bytes there
    "training rows": ("data/train.tsv", 0, b"one row more\t1\n"),
    "file dev": ("data/dev.tsv", 0, b"one row more\t1\n"),
    "tokenizer": ("encoder/sentencepiece.bpe.model", 0, b"\xa2\x06\x00"),  # an unknown field
    "encoder's weights": ("encoder/model.safetensors", -1, b"\x7f"),
}


def test_a_run_resumes_with_what_it_began_with_only(run_train: RunTrain, tiny_encoder: Path, tmp_path: Path) -> None:
    encoder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    run = run_train(tmp_path / "run", "--epochs", 1, "--encoder", encoder, "--save-every", 3)
    before, saved = digests(run), logged(run)
    for what, (file, at, content) in CHANGES.items():
        original = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(original[: len(original) + at] + content)
        line = user_error(resume, run)
        assert f"{what}: changed since the run in {run} was started; restore the original to resume" in line
        (tmp_path / file).write_bytes(original)
    assert (digests(run), logged(run)) == (before, saved)
    resume(run, "--test-file", SAMPLE_DATA / "test.de.tsv")
    assert {"dev", "test.de"} <= {line.get("split") for line in metrics(run)}


def test_a_signal_on_the_last_evaluation_resumes_exactly(run_train: RunTrain, tmp_path: Path, capsys: Capture) -> None:
    options = ["--epochs", 50, "--lr", 1e-9, "--early-stopping-patience", 3, "--eval-every", 2]
    whole = run_train(tmp_path / "whole", *options)
    assert "stopped early: 3 evaluations without a better dev accuracy" in capsys.readouterr().out
    assert state_of(whole).stale_evaluations == 3
    for method in ("advance", "evaluate_split"):
        run = tmp_path / method
        stop_by_signal(state_of(whole).step, method, partial(run_train, run, *options))
        assert state_of(run).evaluation_due
        resume(run)
        assert (digests(run), logged(run), state_of(run)) == (digests(whole), logged(whole), state_of(whole))


def test_what_is_evaluated_after_a_resume_is_saved(run_train: RunTrain, tmp_path: Path, monkeypatch: Patch) -> None:
    options = ["--epochs", 2, "--eval-every", 3]
    stop_by_signal(3, "advance", lambda: run_train(tmp_path / "run", *options))
    assert (state_of(tmp_path / "run").evaluation_due, state_of(tmp_path / "run").evaluations) == (True, 0)
    monkeypatch.setattr(train, "train", lambda run: run.finisher.wait() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resume(tmp_path / "run")
    monkeypatch.undo()
    after = state_of(tmp_path / "run")
    assert (after.step, after.evaluation_due, after.evaluations) == (3, False, 1)
    resume(tmp_path / "run")
    assert logged(tmp_path / "run") == logged(run_train(tmp_path / "whole", *options))


def test_checkpoints_have_decisions_and_configs_wishes(
    run_train: RunTrain, small_data: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """So that a run resumes as it began on other hardware, and one from its config with one change is a fresh run."""
    (small_data / "dev.tsv").write_text("sentence\tlabel\nA fine film.\t1\n")
    monkeypatch.setattr(train, "choose_precision", lambda *_: "bf16")
    options = ["--epochs", 1, "--precision", "auto"]
    run = run_train(tmp_path / "a", *options, "--batch-size", 2, "--save-every", 10, "--keep-checkpoints", 9)
    config, state, whole = json.loads((run / "config.json").read_text()), state_of(run), digests(run)
    assert (config["precision"], config["eval_every"]) == ("auto", None)
    assert (state.precision, state.eval_every) == ("bf16", 4), "eight times in 25 steps"
    forget_after(run, 10)
    monkeypatch.setattr(train, "choose_precision", lambda *_: "fp32")
    resume(run)
    assert digests(run) == whole
    train.main(["--config", str(run / "config.json"), "--batch-size", "4", "--output-dir", str(tmp_path / "b")])
    fresh = run_train(tmp_path / "c", *options, "--batch-size", 4, "--save-every", 10)
    assert logged(tmp_path / "b") == logged(fresh)
    assert state_of(tmp_path / "b").eval_every == state_of(fresh).eval_every == 2


def test_the_lower_loss_decides_between_equally_good_evaluations() -> None:
    state = TrainState(10, "fp32", 0, {})
    state.count_evaluation(0.5, 0.7)
    assert [state.is_best(*each) for each in ((0.5, 0.7), (0.5, 0.8), (0.49, 0.1))] == [False] * 3
    assert [state.is_best(*each) for each in ((0.5, 0.69), (0.51, 9.0))] == [True] * 2
