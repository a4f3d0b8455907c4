"""Whole runs: what one leaves, exact resume, independence of the number of processes."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SAMPLE_DATA, Capture, Patch, RunTrain, Words, change_json, losses, metrics, user_error
from running import digests, forget_after, logged, resume, run_ranks, state_of, torchrun, train_on_ranks
from safetensors.torch import load_file, save_file

from sst2_xlmr import train
from sst2_xlmr.data.batches import rows_in_training_order
from sst2_xlmr.model.tokenizer import Tokenizer
from sst2_xlmr.training.step import forward_backward
from sst2_xlmr.util.distributed import World

# Without the kernels, whose dropout belongs to rows, only a run without dropout is the same however it is cut.
PLAIN = ["--no-compile", "--dropout", 0, "--head-dropout", 0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(ours: Path, theirs: Path, atol: float) -> None:
    torch.testing.assert_close(weights(ours), weights(theirs), atol=atol, rtol=0)


def test_run_folder(run_train: RunTrain, tmp_path: Path, capsys: Capture) -> None:
    test_files = [SAMPLE_DATA / "test.de.tsv", SAMPLE_DATA / "test.ru.tsv"]
    run = run_train(tmp_path / "run", "--epochs", 2, "--eval-every", 5, "--test-file", *test_files)
    names = {entry.name for entry in run.iterdir()}
    assert names == {".lock", "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "best", "model"}
    assert json.loads((run / "config.json").read_text())["batch_size"] == 8
    lines = metrics(run)
    training = [line for line in lines if "split" not in line]
    assert [line["step"] for line in training] == list(range(1, 15))
    assert set(training[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s"}
    evaluations = [(line["step"], line["split"], line["rows"]) for line in lines if "split" in line]
    dev = [line["accuracy"] for line in lines if line.get("split") == "dev"]
    best_too = [""] if max(dev) > max(dev[:-1]) else ["", "best/"]
    assert evaluations == [
        *((step, "dev", 20) for step in (5, 7, 12, 14)),
        *((14, f"{best}{split}", 40) for best in best_too for split in ("test.de", "test.ru")),
    ]
    numbers = {"loss", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "ece", "precision", "recall", "rows"}
    assert set(lines[-1]) == {"step", "split", *numbers}
    files = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for folder in ("best", "model"):
        assert {entry.name for entry in (run / folder).iterdir()} == {*files, "sentencepiece.bpe.model"}
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["step-00000007", "step-00000014"]
    assert len(list((run / "tensorboard").iterdir())) == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "dev: accuracy" in printed.out
    assert str(run / "model") in printed.out.splitlines()[-1]


def test_same_seed_same_bits_other_seed_other_run(run_train: RunTrain, tmp_path: Path) -> None:
    """Also of a run that is started with the configuration that another one has saved."""
    first = run_train(tmp_path / "first", "--epochs", 1, "--lr", 3e-4, "--seed", 5)
    again = ["--config", str(first / "config.json"), "--output-dir"]
    train.main([*again, str(tmp_path / "second")])
    train.main([*again, str(tmp_path / "third"), "--seed", "6"])
    assert losses(tmp_path / "second") == losses(first)
    assert_same_weights(tmp_path / "second", first, 0.0)
    assert losses(tmp_path / "third") != losses(first)


@pytest.mark.parametrize(("precision", "how"), [("fp32", "--compile"), ("bf16", "--compile"), ("bf16", "--no-compile")])
def test_resumed_equals_uninterrupted(run_train: RunTrain, tmp_path: Path, precision: str, how: str) -> None:
    """In the middle of an epoch, at its end, and after it; with dropout, and between two lines of metrics."""
    options = ["--epochs", 2, "--precision", precision, how, "--log-every", 3, "--micro-batch-size", 3]
    options += ["--save-every", 1, "--keep-checkpoints", 100, "--eval-every", 4]
    whole = run_train(tmp_path / "whole", *options)
    for stop in (10, 7, 4):
        broken = Path(shutil.copytree(whole, tmp_path / f"stopped-{stop}"))
        forget_after(broken, stop)
        resume(broken)
        assert (digests(broken), logged(broken)) == (digests(whole), logged(whole))


def test_resume_of_a_finished_run_changes_nothing(run_train: RunTrain, tmp_path: Path) -> None:
    """Its best model is another than its last one, and has been evaluated on the test file, too."""
    options = ["--epochs", 4, "--lr", 3e-3, "--eval-every", 3, "--test-file", SAMPLE_DATA / "test.de.tsv"]
    run = run_train(tmp_path / "run", *options)
    before, lines, card = digests(run), metrics(run), (run / "model" / "README.md").read_text()
    assert [line["split"] for line in lines[-2:]] == ["test.de", "best/test.de"]
    with (run / "metrics.jsonl").open("ab") as file:  # what a power failure may leave
        file.write(b'\x00\xff[1]\n[1]\n{"step": "x"}\n{"st')
    for missing in ("nothing", "model"):  # the latter as if it had been killed before
        shutil.rmtree(run / missing, ignore_errors=True)
        resume(run)
        assert metrics(run) == lines
        assert (digests(run), (run / "model" / "README.md").read_text()) == (before, card)


@pytest.mark.parametrize("how", [["--dropout", 0.1], PLAIN], ids=["kernels", "plain"])
def test_micro_batches_change_nothing(run_train: RunTrain, tmp_path: Path, how: list[object]) -> None:
    options = ["--epochs", 2, *how, "--label-smoothing", 0.1]
    whole = run_train(tmp_path / "whole", *options)
    for size in (1, 3):
        cut = run_train(tmp_path / f"cut{size}", *options, "--micro-batch-size", size)
        assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
        assert_same_weights(cut, whole, 1e-5)


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, PLAIN),
        # 50 rows: the last batch has one row, so that one of the ranks has none; resumed by one process below.
        (2, ["--batch-size", 7, "--save-every", 20, "--log-every", 3]),
        (3, ["--batch-size", 7, "--micro-batch-size", 1]),
    ],
)
def test_processes_change_nothing(train_words: Words, tmp_path: Path, processes: int, options: list[object]) -> None:
    """In fp32, with dropout: every loss within 1e-5, all weights within 1e-5. The first of them under torchrun."""
    one, many, options = tmp_path / "one", tmp_path / "many", ["--max-steps", 32, "--keep-checkpoints", 9, *options]
    train.main(train_words(one, *options))
    words = train_words(many, *options)
    said = torchrun(processes, words) if "--no-compile" in options else train_on_ranks(processes, words, tmp_path)
    assert said.count("encoder  ") == 1, "only rank 0 speaks"
    assert len(expected := losses(one)) == (11 if "--log-every" in options else 32)
    assert losses(many) == pytest.approx(expected, rel=1e-5)
    assert_same_weights(many, one, 1e-5)
    ours, theirs = metrics(many)[-1], metrics(one)[-1]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert (ours["accuracy"], ours["rows"]) == (theirs["accuracy"], theirs["rows"])
    if "--save-every" in options:  # another number of processes goes on in the middle of an epoch
        forget_after(many, 20)
        resume(many)
        assert losses(many) == pytest.approx(expected, rel=1e-5)
        assert_same_weights(many, one, 1e-5)


def test_two_processes_in_bf16_with_micro_batches(train_words: Words, run_train: RunTrain, tmp_path: Path) -> None:
    options = ["--epochs", 2, "--dropout", 0, "--head-dropout", 0, "--precision", "bf16", "--micro-batch-size", 2]
    expected = metrics(run_train(tmp_path / "one", *options))
    for nodes in (False, True):
        run = tmp_path / f"two-{nodes}"
        train_on_ranks(2, train_words(run, *options), tmp_path, nodes)
        for key in ("loss", "grad_norm"):
            ours, theirs = ([line[key] for line in lines if key in line] for lines in (metrics(run), expected))
            assert ours == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize(("processes", "options"), [(2, ["--micro-batch-size", 2]), (3, [])])
def test_shared_and_sent_gradients_give_the_same_bits_and_resume_exactly(
    train_words: Words, tmp_path: Path, processes: int, options: list[object]
) -> None:
    """In fp32, where both add the ranks' gradients in their order; clipping would show how the norm was added."""
    options = ["--epochs", 2, "--max-grad-norm", 0, "--save-every", 5, "--keep-checkpoints", 9, *options]
    for name, nodes in (("shared", False), ("sent", True)):
        run = tmp_path / name
        said = train_on_ranks(processes, train_words(run, *options), tmp_path, nodes)
        assert (f"{processes} processes that share memory;" in said) != nodes
        whole, lines = digests(run), losses(run)
        forget_after(run, 5)
        assert "step-00000005" in train_on_ranks(processes, ["--resume", "--output-dir", str(run)], tmp_path, nodes)
        assert (digests(run), losses(run)) == (whole, lines)
    assert lines == losses(tmp_path / "shared")
    assert whole == digests(tmp_path / "shared")


def test_an_error_of_all_ranks_is_said_once(train_words: Words, small_data: Path, tmp_path: Path) -> None:
    with (small_data / "train.tsv").open("a") as file:
        file.write("no label here\n")
    statuses, _, errors = run_ranks(2, train_words(tmp_path / "run"), tmp_path)
    assert statuses == [2, 2]
    assert errors.count("error: ") == 1
    assert "train.tsv, line 52: 1 of 51 rows cannot be used" in errors
    assert not (tmp_path / "run").exists()


def test_training_goes_on_without_a_reader(train_words: Words, tmp_path: Path) -> None:
    options = train_words(tmp_path / "run", "--epochs", 1)
    command, pipe = [sys.executable, "train.py", *options], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()  # as `head` does
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert said == "warning: cannot write to standard output: Broken pipe; continuing without it\n"
    assert (tmp_path / "run" / "model").is_dir()


def test_layers_is_a_shorter_encoder(run_train: RunTrain, tiny_encoder: Path, tmp_path: Path, capsys: Capture) -> None:
    shorter = Path(shutil.copytree(tiny_encoder, tmp_path / "shorter"))
    change_json(shorter / "config.json", num_hidden_layers=2)
    tensors = {n: t for n, t in load_file(shorter / "model.safetensors").items() if ".layer.2." not in n}
    save_file(tensors, shorter / "model.safetensors")
    options = ["--epochs", 2, "--layerwise-lr-decay", 0.5]
    theirs = run_train(tmp_path / "theirs", *options, "--encoder", shorter)
    ours = run_train(tmp_path / "ours", *options, "--layers", 2, "--save-every", 3, "--keep-checkpoints", 9)
    assert ": 2 of 3 layers, 32 wide" in capsys.readouterr().out
    assert losses(ours) == losses(theirs)
    assert_same_weights(ours, theirs, 0.0)
    assert json.loads((ours / "model" / "config.json").read_text())["num_hidden_layers"] == 2
    whole = digests(ours)
    forget_after(ours, 9)
    resume(ours)
    assert digests(ours) == whole


def test_frozen_encoder_stays_as_it_was(run_train: RunTrain, tiny_encoder: Path, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--epochs", 2, "--freeze-encoder", "--precision", "bf16")
    before, after = load_file(tiny_encoder / "model.safetensors"), weights(run)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert any(tensor.any() for name, tensor in after.items() if name not in before and name.endswith("bias"))


@pytest.mark.parametrize("how", ["--compile", "--no-compile"])
def test_a_loss_that_explodes_stops_the_run(run_train: RunTrain, small_data: Path, tmp_path: Path, how: str) -> None:
    train_file, dev_file = small_data / "train.tsv", small_data / "dev.tsv"
    train_file.write_text(dev_file.read_text() + "".join(train_file.open().readlines()[1:]))  # 20 leaks, and 50 rows
    options = [how, "--epochs", 5, "--lr", 1e30, "--warmup-ratio", 0, "--max-grad-norm", 0, "--log-every", 1000]
    line = user_error(run_train, tmp_path / "run", *options, "--drop-leaks", "--batch-size", 25, "--eval-every", 0)
    _, found, numbers = line.partition("the gradient is not finite at step 2, training rows of this batch: ")
    assert found
    rows = {int(number) for number in re.findall(r"train.tsv:(\d+)", numbers)}
    assert len(rows) == 25
    assert min(rows) > 21 and max(rows) > 50, "lines of the file"
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def spoil_steps(monkeypatch: Patch, *bad: int) -> None:
    """As a fault of the hardware would: the gradient of rank 0 is not finite at these of the steps that follow."""
    real, calls = forward_backward, [0]

    def spoiled(model: Any, batches: Any, loss: Any, world: World) -> Any:
        calls[0] += 1
        spoils = calls[0] in bad and world.rank == 0
        return real(model, batches, (lambda *rows: loss(*rows) * math.nan) if spoils else loss, world)

    monkeypatch.setattr(train, "forward_backward", spoiled)


def test_batches_without_a_finite_gradient_are_skipped(
    train_words: Words, tiny_encoder: Path, small_data: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Two in a row are allowed and three are not, on every rank alike; a resumed run goes on counting."""
    skips, stops = tmp_path / "skips", tmp_path / "stops"
    options = ["--epochs", 2, "--save-every", 4, "--skip-nonfinite", 2]
    spoil_steps(monkeypatch, 3, 9, 10)
    said = train_on_ranks(2, train_words(skips, *options), tmp_path)
    assert all(f"step {step:>6}  gradient is not finite: batch skipped" in said for step in (3, 9, 10))
    assert [line["step"] for line in metrics(skips) if "split" not in line] == [1, 2, *range(4, 9), *range(11, 15)]
    state = state_of(skips)
    assert (state.skipped, state.skipped_in_row) == (3, 0)
    assert all(torch.isfinite(tensor).all() for tensor in weights(skips).values())

    spoil_steps(monkeypatch, 5, 6, 7)
    statuses, _, errors = run_ranks(2, train_words(stops, *options), tmp_path)
    assert statuses == [2, 2]
    assert errors.count("error: ") == 1
    assert "the gradient is not finite at step 7 (the last of 3 in a row)" in errors
    texts = [line.split("\t")[0] for line in (small_data / "train.tsv").read_text("utf-8").splitlines()[1:]]
    lengths = Tokenizer(tiny_encoder / "sentencepiece.bpe.model", 64).flat_ids(texts)[1]
    expected = next(rows_in_training_order(lengths, 8, 0, 0, first=6))
    assert "batch: " + ", ".join(f"train.tsv:{row + 2}" for row in expected) + ":" in errors
    assert state_of(stops).step == 4
    spoil_steps(monkeypatch)
    resume(stops, "--skip-nonfinite", 0)
    assert metrics(stops)[-1]["step"] == 14
