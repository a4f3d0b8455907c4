"""Where a run is: position, best evaluation, skipped batches; and what a resumed run must share with its beginning."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SAMPLE_DATA, losses, metrics, user_error
from running import digests, logged

from sst2_xlmr import engines, train
from sst2_xlmr.training.checkpoint import find_checkpoint, read_state
from sst2_xlmr.training.guard import NotFinite, check_skipped
from sst2_xlmr.training.state import TrainState

RunTrain = Callable[..., Path]


def resume(run: Path, *options: object) -> None:
    train.main(["--resume", "--output-dir", str(run), *map(str, options)])


def state_of(run: Path) -> TrainState:
    checkpoint = find_checkpoint(run / "checkpoints", pytest.fail)
    assert checkpoint is not None
    return read_state(checkpoint)


def forget_after(run: Path, step: int) -> None:
    """Remove the checkpoints of all steps after this one."""
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:08d}":
            shutil.rmtree(checkpoint)
    assert state_of(run).step == step


def test_position_rolls_over_into_the_next_epoch() -> None:
    state, positions = TrainState(3), []
    for _ in range(4):
        state.advance()
        positions.append((state.step, state.epoch, state.batch, round(state.epochs, 2)))
    assert positions == [(1, 0, 1, 0.33), (2, 0, 2, 0.67), (3, 1, 0, 1.0), (4, 1, 1, 1.33)]


def test_batches_skipped_in_a_row_are_limited() -> None:
    state, rows = TrainState(10), np.array([4, 7])
    for skipped in (True, True, False, True, True):
        state.advance(skipped)
        check_skipped(state, 2, rows)
    assert (state.step, state.updates, state.skipped, state.skipped_in_row) == (5, 1, 4, 2)
    state.advance(skipped=True)
    with pytest.raises(NotFinite, match=r"not finite at step 6 \(the last of 3 in a row\).*from 1: 5, 8: ") as error:
        check_skipped(state, 2, rows)
    assert error.value.is_shared


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("begins", ["engine", "plain"])
def test_plain_pytorch_and_the_engine_compute_the_same_and_resume_each_other(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, begins: str
) -> None:
    """30 steps without dropout: losses within 1e-5 in fp32; in bf16 they round at other places.

    The second half of a run is another machine's, which has no compiler, or has one where the first had none.
    """
    options = ["--dropout", 0, "--head-dropout", 0, "--precision", precision, "--max-steps", 30, "--save-every", 15]
    options += ["--keep-checkpoints", 9]
    near = 1e-5 if precision == "fp32" else 3e-2

    @contextlib.contextmanager
    def machine(how: str) -> Iterator[None]:
        with monkeypatch.context() as patched:
            if how == "plain":
                patched.setattr(engines, "load_kernels", lambda _: None)
            yield

    ends = "plain" if begins == "engine" else "engine"
    with machine(begins):
        run = run_train(tmp_path / "run", *options)
    plain = run_train(tmp_path / "plain", *options, "--no-compile")
    assert losses(run) == pytest.approx(losses(plain), abs=near)
    forget_after(run, 15)
    with machine(ends):
        resume(run)
    assert losses(run) == pytest.approx(losses(plain), abs=near)


def another(what: str, run: Path, data: Path, encoder: Path) -> None:
    """Change one of the things that a run reads."""
    if what == "training rows":
        lines = (data / "train.tsv").read_text(encoding="utf-8").splitlines()
        (data / "train.tsv").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    elif what == "file dev":
        shutil.copy(SAMPLE_DATA / "test.de.tsv", data / "dev.tsv")
    elif what == "tokenizer":
        content = bytearray((encoder / "sentencepiece.bpe.model").read_bytes())
        (encoder / "sentencepiece.bpe.model").write_bytes(content + bytes([0xA2, 0x06, 0x00]))  # an unknown field
    else:
        content = bytearray((encoder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (encoder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize("what", ["training rows", "file dev", "tokenizer", "encoder's weights"])
def test_a_run_resumes_with_what_it_began_with_only(
    run_train: RunTrain,
    small_data: Path,
    tiny_encoder: Path,
    tmp_path: Path,
    what: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    run = run_train(tmp_path / "run", "--epochs", 1, "--encoder", encoder, "--save-every", 3)
    before, saved = digests(run), logged(run)
    another(what, run, small_data, encoder)
    line = user_error(lambda: resume(run), capsys)
    assert f"the {what} differ from those that the run in {run} was started with; give the same" in line
    assert (digests(run), logged(run)) == (before, saved)


def test_other_test_files_may_be_given(run_train: RunTrain, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--epochs", 1)
    resume(run, "--test-file", SAMPLE_DATA / "test.de.tsv")
    assert {"dev", "test.de"} <= {line.get("split") for line in metrics(run)}


class Signal:
    """A signal that comes as soon as the run looks for one at some step, during an evaluation or after a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, where: str) -> None:
        self.step, self.where, self.came, self.inside = step, where, False, False
        real, evaluate = train.Run.__init__, train.Run.evaluate_split

        def init(run: Any, *arguments: Any) -> None:
            real(run, *arguments)
            asked = run.stop.is_agreed

            def is_agreed() -> bool:
                place = "evaluation" if self.inside else "step"
                if not self.came and (run.state.step, place) == (self.step, self.where):
                    self.came, run.stop.number = True, 15
                return bool(asked())

            run.stop.is_agreed = is_agreed

        def evaluate_split(run: Any, *arguments: Any, **options: Any) -> Any:
            self.inside = True
            try:
                return evaluate(run, *arguments, **options)
            finally:
                self.inside = False

        monkeypatch.setattr(train.Run, "__init__", init)
        monkeypatch.setattr(train.Run, "evaluate_split", evaluate_split)


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_a_signal_on_the_evaluation_that_ends_the_run_early_resumes_exactly(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    options = ["--epochs", 50, "--lr", 1e-9, "--early-stopping-patience", 2, "--eval-every", 2]
    whole = run_train(tmp_path / "whole", *options)
    last = state_of(whole).step
    with monkeypatch.context() as patched:
        signal = Signal(patched, last, where)
        with pytest.raises(SystemExit) as stopped:
            run_train(tmp_path / "run", *options)
    assert signal.came and stopped.value.code == 128 + 15
    assert state_of(tmp_path / "run").evaluation_due
    resume(tmp_path / "run")
    assert digests(tmp_path / "run") == digests(whole)
    assert logged(tmp_path / "run") == logged(whole)
    assert state_of(tmp_path / "run") == state_of(whole)


def test_what_is_evaluated_after_a_resume_is_saved(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the run dies right after it."""
    options = ["--epochs", 2, "--eval-every", 3]
    with monkeypatch.context() as patched:
        Signal(patched, 3, "step")
        with pytest.raises(SystemExit):
            run_train(tmp_path / "run", *options)
    before = state_of(tmp_path / "run")
    assert (before.evaluation_due, before.evaluations) == (True, 0)
    with monkeypatch.context() as patched:
        patched.setattr(train, "train", lambda run: run.finisher.wait() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resume(tmp_path / "run")
    after = state_of(tmp_path / "run")
    assert (after.step, after.evaluation_due, after.evaluations) == (3, False, 1)
    resume(tmp_path / "run")
    assert logged(tmp_path / "run") == logged(run_train(tmp_path / "whole", *options))


def test_what_was_decided_is_in_the_checkpoint_and_what_was_asked_in_the_config(
    run_train: RunTrain, small_data: Path, tmp_path: Path
) -> None:
    """So that a run from it with one change is a fresh run with this option."""
    (small_data / "dev.tsv").write_text("sentence\tlabel\nA fine film.\t1\n")
    run = run_train(tmp_path / "a", "--epochs", 1, "--batch-size", 2, "--precision", "auto")
    config, state = json.loads((run / "config.json").read_text()), state_of(run)
    assert (config["precision"], config["eval_every"]) == ("auto", None)
    assert state.precision in ("fp32", "bf16")
    assert state.eval_every == 4, "eight times in 25 steps"
    train.main(["--config", str(run / "config.json"), "--batch-size", "4", "--output-dir", str(tmp_path / "b")])
    fresh = run_train(tmp_path / "c", "--epochs", 1, "--batch-size", 4, "--precision", "auto")
    assert logged(tmp_path / "b") == logged(fresh)
    assert state_of(tmp_path / "b").eval_every == state_of(fresh).eval_every == 2


def test_a_checkpoint_decides_what_hardware_would_decide_otherwise(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "choose_precision", lambda *_: "bf16")
    run = run_train(tmp_path / "run", "--epochs", 1, "--precision", "auto", "--save-every", 3, "--keep-checkpoints", 9)
    whole = digests(run)
    forget_after(run, 3)
    monkeypatch.setattr(train, "choose_precision", lambda *_: "fp32")
    resume(run)
    assert digests(run) == whole
