"""Where a run is, what is due there, the rate and sums; what a resumed run must share with its beginning."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ALONE, SAMPLE_DATA, Capture, Patch, RunTrain, kernels_for, losses, metrics, user_error
from running import digests, forget_after, logged, resume, state_of, stop_by_signal

from sst2_xlmr import train
from sst2_xlmr.config import Config
from sst2_xlmr.data.batches import MicroBatch
from sst2_xlmr.training.meter import TrainMeter
from sst2_xlmr.training.schedule import Schedule, evaluation_interval
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util.errors import UserError


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
    assert ("; CPU engine" in capsys.readouterr().out) == (ends == "--compile")
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
    monkeypatch.setattr(train, "train", lambda run: run.background_writer.wait() or 1 / 0)
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


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0.11, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("constant", 0.2, [0.5] + [1.0] * 9),
        ("cosine", 0.2, [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]),
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 1.0, [0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_schedule(schedule: str, warmup: float, expected: list[float]) -> None:
    steps = len(expected)
    found = Schedule(Config(lr=2.0, max_steps=steps, warmup_ratio=warmup, schedule=schedule), 100, 0)
    assert [found.lr(step) / 2 for step in range(steps)] == pytest.approx(expected)


def state_at(step: int, batches: int = 10) -> TrainState:
    state = TrainState(batches)
    for _ in range(step):
        state.advance()
    return state


def test_what_is_due_follows_from_the_position() -> None:
    schedule = Schedule(Config(epochs=2, log_every=4, save_every=3), 10, eval_every=6)
    dues = [schedule.due(state_at(step)) for step in range(1, 21)]
    assert [step for step, due in enumerate(dues, 1) if "log" in due] == [4, 8, 12, 16, 20]
    assert [step for step, due in enumerate(dues, 1) if "evaluation" in due] == [6, 10, 16, 20]
    assert [step for step, due in enumerate(dues, 1) if "checkpoint" in due] == [3, 6, 9, 10, 12, 15, 18, 20]
    assert [schedule.is_over(state_at(step)) for step in (19, 20)] == [False, True]


def test_evaluations_are_about_eight_an_epoch_in_little_time() -> None:
    assert evaluation_interval(2105, 1_000_000, 22_000) == 527, "SST-2: four times; eight would take 6 % of the time"
    assert evaluation_interval(31250, 20_000_000, 22_000) == 3907, "eight times"
    assert evaluation_interval(313, 150_000, 22_000) == 0, "a tenth of SST-2: only at the end of an epoch"
    assert evaluation_interval(313, 300_000, 22_000) == 0, "once, and that is the end"
    assert evaluation_interval(5, 10_000_000, 100) == 1


@pytest.mark.parametrize(
    ("config", "steps"),
    [(Config(epochs=1), 313), (Config(epochs=2.5), 782), (Config(epochs=0.001), 1), (Config(max_steps=7), 7)],
)
def test_a_last_step_within_an_epoch_is_an_end_too(config: Config, steps: int) -> None:
    schedule = Schedule(config, 313, 0)
    assert schedule.total_steps == steps
    assert steps == 1 or not schedule.due(state_at(steps - 1, 313))
    assert schedule.due(state_at(steps, 313)) == {"log", "evaluation", "checkpoint"}


def add(meter: TrainMeter, loss: float = 2.0, norm: float = 0.5) -> None:
    """Add two rows of 9 tokens in all, and one row that is only computed to keep step with other ranks."""
    rows = MicroBatch(torch.zeros(9), torch.tensor([4, 5]), torch.zeros(2), torch.zeros(2), 2)
    idle = MicroBatch(torch.zeros(3), torch.tensor([3]), torch.zeros(1), torch.zeros(1), 2, factor=0.0)
    meter.add({"loss": torch.tensor(loss, dtype=torch.float64)}, torch.tensor(norm), [rows, idle])


def test_means_since_the_last_line() -> None:
    meter = TrainMeter(ALONE)
    add(meter)
    add(meter, 4.0, 0.25)
    meter.reduce(2)
    assert [meter.totals[name] for name in ("rows", "tokens", "loss")] == [4, 18, 6]
    meter.totals["seconds"] = 2.0
    means = {"step": 2, "epoch": 0.2, "loss": 1.5, "lr": 0.1, "grad_norm": 0.25}
    speeds = {"samples_per_s": 2.0, "tokens_per_s": 9.0}
    assert meter.flush(TrainState(10, step=2, batch=2), lr=0.1) == {**means, **speeds}
    assert meter.totals == {"grad_norm": 0.25}


@pytest.mark.parametrize(("what", "bad"), [("norm", math.inf), ("loss", math.nan)])
def test_what_is_not_finite_is_noticed_whatever_comes_after(what: str, bad: float) -> None:
    """A norm that overflows although every gradient is finite, and a loss whose gradient is finite."""
    meter = TrainMeter(ALONE)
    add(meter)
    add(meter, **{what: bad})
    add(meter)
    with pytest.raises(UserError, match="loss or gradient is not finite at step 3 or shortly before") as error:
        meter.reduce(3)
    assert "rows" not in str(error.value), "it may have been the batch of another step"
