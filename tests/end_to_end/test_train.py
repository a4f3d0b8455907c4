"""The real command line: what a run leaves, exact resume, independence of the number of processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE_DATA, losses, metrics, torchrun, train_options, user_error
from running import digests, launcher, logged
from safetensors.torch import load_file, save_file

from sst2_xlmr import train
from sst2_xlmr.data.batches import rows_in_training_order
from sst2_xlmr.model.tokenizer import load_tokenizer
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.training.checkpoint import find_checkpoint

RunTrain = Callable[..., Path]
# Without the kernels, whose dropout belongs to rows, only a run without dropout is the same however it is cut.
PLAIN = ["--no-compile", "--dropout", 0, "--head-dropout", 0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(ours: Path, theirs: Path, atol: float) -> None:
    expected = weights(theirs)
    for name, tensor in weights(ours).items():
        torch.testing.assert_close(tensor, expected[name], atol=atol, rtol=0, msg=name)


def test_run_folder(run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    for folder in ("best", "model"):
        assert {entry.name for entry in (run / folder).iterdir()} == {
            "README.md",
            "config.json",
            "model.safetensors",
            "sentencepiece.bpe.model",
            "tokenizer.json",
            "tokenizer_config.json",
        }
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["step-00000007", "step-00000014"]
    assert len(list((run / "tensorboard").iterdir())) == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "dev: accuracy" in printed.out
    assert str(run / "model") in printed.out.splitlines()[-1]


def test_same_seed_same_bits_other_seed_other_run(run_train: RunTrain, tmp_path: Path) -> None:
    first, second, other = (
        run_train(tmp_path / name, "--epochs", 1, "--seed", seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert losses(first) == losses(second)
    assert_same_weights(first, second, 0.0)
    assert losses(first) != losses(other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stop", "compiles"), [(4, True), (4, False), (7, True), (10, True)])
def test_resumed_equals_uninterrupted(
    run_train: RunTrain, tmp_path: Path, stop: int, compiles: bool, precision: str
) -> None:
    """In the middle of an epoch, at its end, and after it; with dropout, and between two lines of metrics."""
    options = ["--epochs", 2, "--precision", precision, "--log-every", 3, "--micro-batch-size", 3]
    options += ["--save-every", 1, "--keep-checkpoints", 100, "--eval-every", 4]
    options += ["--compile" if compiles else "--no-compile"]
    whole = run_train(tmp_path / "whole", *options)
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for checkpoint in (broken / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > stop:
            shutil.rmtree(checkpoint)
    shutil.rmtree(broken / "model")
    train.main(["--resume", "--output-dir", str(broken)])
    assert digests(broken) == digests(whole)
    assert logged(broken) == logged(whole)


def test_resume_of_a_finished_run_changes_nothing(run_train: RunTrain, tmp_path: Path) -> None:
    """Its best model is another than its last one, and has been evaluated on the test file, too."""
    options = ["--epochs", 4, "--lr", 3e-3, "--eval-every", 3, "--test-file", SAMPLE_DATA / "test.de.tsv"]
    run = run_train(tmp_path / "run", *options)
    before, lines = digests(run), metrics(run)
    assert [line["split"] for line in lines[-2:]] == ["test.de", "best/test.de"]
    with (run / "metrics.jsonl").open("ab") as file:  # what a power failure may leave
        file.write(b'\x00\xff[1]\n[1]\n{"step": "x"}\n{"st')
    train.main(["--resume", "--output-dir", str(run)])
    assert metrics(run) == lines
    assert digests(run) == before


def test_saved_config_runs_again(run_train: RunTrain, tmp_path: Path) -> None:
    first = run_train(tmp_path / "first", "--epochs", 1, "--lr", 3e-4)
    train.main(["--config", str(first / "config.json"), "--output-dir", str(tmp_path / "second")])
    assert losses(tmp_path / "second") == losses(first)
    train.main(["--config", str(first / "config.json"), "--output-dir", str(tmp_path / "third"), "--seed", "9"])
    assert losses(tmp_path / "third") != losses(first)


@pytest.mark.parametrize("how", [["--dropout", 0.1], PLAIN], ids=["kernels", "plain"])
def test_micro_batches_change_nothing(run_train: RunTrain, tmp_path: Path, how: list[object]) -> None:
    options = ["--epochs", 2, *how, "--label-smoothing", 0.1]
    whole = run_train(tmp_path / "whole", *options)
    for size in (1, 3, 8):
        cut = run_train(tmp_path / f"cut{size}", *options, "--micro-batch-size", size)
        assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
        assert_same_weights(cut, whole, 1e-5)


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, PLAIN),
        (2, ["--batch-size", 30, "--micro-batch-size", 4]),
        # 50 rows: the last batch has one row, so that one of the ranks has none; resumed by one process below.
        (2, ["--batch-size", 7, "--save-every", 30]),
        (3, ["--batch-size", 7, "--micro-batch-size", 1]),
    ],
)
def test_processes_change_nothing(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, processes: int, options: list[object]
) -> None:
    """In fp32, with dropout, over 50 steps and more: every loss within 1e-5, all weights within 1e-5."""
    options = ["--max-steps", 56, "--keep-checkpoints", 9, *options]
    train.main(train_options(tiny_encoder, small_data, tmp_path / "one", *options))
    done = torchrun(processes, train_options(tiny_encoder, small_data, tmp_path / "many", *options))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("encoder  ") == 1, "only rank 0 speaks"
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert len(losses(tmp_path / "many")) == 56
    assert_same_weights(tmp_path / "many", tmp_path / "one", 1e-5)
    ours, theirs = metrics(tmp_path / "many")[-1], metrics(tmp_path / "one")[-1]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert [ours[key] for key in ("accuracy", "rows")] == [theirs[key] for key in ("accuracy", "rows")]
    if "--save-every" in options:  # another number of processes goes on in the middle of an epoch
        expected = losses(tmp_path / "one")
        for checkpoint in (tmp_path / "many" / "checkpoints").iterdir():
            if checkpoint.name != "step-00000030":
                shutil.rmtree(checkpoint)
        train.main(["--resume", "--output-dir", str(tmp_path / "many")])
        assert losses(tmp_path / "many") == pytest.approx(expected, rel=1e-5)
        assert_same_weights(tmp_path / "many", tmp_path / "one", 1e-5)


@pytest.mark.parametrize("nodes", [False, True])
def test_two_processes_in_bf16_with_micro_batches(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, nodes: bool
) -> None:
    options = ["--epochs", 2, "--dropout", 0, "--head-dropout", 0, "--precision", "bf16", "--micro-batch-size", 2]
    train.main(train_options(tiny_encoder, small_data, tmp_path / "one", *options))
    done = torchrun(2, train_options(tiny_encoder, small_data, tmp_path / "two", *options), nodes)
    assert done.returncode == 0, done.stderr
    ours, theirs = (metrics(tmp_path / run) for run in ("two", "one"))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in ours if key in line] == pytest.approx(
            [line[key] for line in theirs if key in line], rel=0.03
        )


@pytest.mark.parametrize(("processes", "options"), [(2, ["--micro-batch-size", 2]), (3, [])])
def test_shared_and_sent_gradients_give_the_same_bits(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, processes: int, options: list[object]
) -> None:
    """In fp32, where both add the ranks' gradients in their order; clipping would show how the norm was added."""
    options = ["--epochs", 2, "--max-grad-norm", 0, "--save-every", 5, *options]
    for run, nodes in (("shared", False), ("sent", True)):
        done = torchrun(processes, train_options(tiny_encoder, small_data, tmp_path / run, *options), nodes)
        assert done.returncode == 0, done.stderr
        assert (f"{processes} processes that share memory;" in done.stdout) != nodes
    assert losses(tmp_path / "shared") == losses(tmp_path / "sent")
    assert digests(tmp_path / "shared") == digests(tmp_path / "sent")


@pytest.mark.parametrize("nodes", [False, True])
def test_three_processes_resume_to_the_bit(tiny_encoder: Path, small_data: Path, tmp_path: Path, nodes: bool) -> None:
    options = ["--epochs", 2, "--save-every", 5, "--keep-checkpoints", 9]
    assert torchrun(3, train_options(tiny_encoder, small_data, tmp_path / "whole", *options), nodes).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for step in (7, 10, 14):
        shutil.rmtree(tmp_path / "broken" / "checkpoints" / f"step-{step:08d}")
    done = torchrun(3, ["--resume", "--output-dir", str(tmp_path / "broken")], nodes)
    assert "step-00000005" in done.stdout
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "broken", tmp_path / "whole", 0.0)


def test_errors_under_torchrun_are_said_once(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    with (small_data / "train.tsv").open("a") as file:
        file.write("no label here\n")
    done = torchrun(2, train_options(tiny_encoder, small_data, tmp_path / "run"))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "train.tsv, line 52: 1 columns" in done.stderr
    assert not (tmp_path / "run").exists()


def test_training_goes_on_without_a_reader(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    options = train_options(tiny_encoder, small_data, tmp_path / "run", "--epochs", 1)
    command, pipe = [sys.executable, "train.py", *options], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()  # as `head` does
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert said == "warning: cannot write to standard output: Broken pipe; continuing without it\n"
    assert (tmp_path / "run" / "model").is_dir()


def test_early_stopping(run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_train(tmp_path / "run", "--epochs", 50, "--lr", 1e-9, "--early-stopping-patience", 2)
    assert [line["step"] for line in metrics(run) if "split" in line] == [7, 14, 21]
    assert "stopped early" in capsys.readouterr().out
    assert (run / "model" / "model.safetensors").is_file()
    train.main(["--resume", "--output-dir", str(run)])
    assert [line["step"] for line in metrics(run) if "split" in line] == [7, 14, 21]


def test_early_stopping_comes_at_the_same_step_after_a_resume(run_train: RunTrain, tmp_path: Path) -> None:
    options = ["--epochs", 50, "--lr", 1e-5, "--early-stopping-patience", 3, "--eval-every", 2, "--save-every", 1]
    whole = run_train(tmp_path / "whole", *options, "--keep-checkpoints", 100, "--precision", "bf16")
    last = metrics(whole)[-1]["step"]
    for left_out in (1, 3):  # of the last evaluations
        broken = Path(shutil.copytree(whole, tmp_path / f"broken{left_out}"))
        for step in range(last - 2 * left_out + 1, last + 1):
            shutil.rmtree(broken / "checkpoints" / f"step-{step:08d}")
        train.main(["--resume", "--output-dir", str(broken)])
        assert digests(broken) == digests(whole)
        assert logged(broken) == logged(whole)


def test_the_lowest_layers_train_like_a_shorter_encoder(
    run_train: RunTrain, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shorter = Path(shutil.copytree(tiny_encoder, tmp_path / "shorter"))
    settings = {**json.loads((shorter / "config.json").read_text()), "num_hidden_layers": 2}
    (shorter / "config.json").write_text(json.dumps(settings))
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
    for folder in ("model", "checkpoints/step-00000014", "checkpoints/step-00000012"):
        shutil.rmtree(ours / folder)
    train.main(["--resume", "--output-dir", str(ours)])
    assert digests(ours) == whole


def test_frozen_encoder_stays_as_it_was(run_train: RunTrain, tiny_encoder: Path, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--epochs", 2, "--freeze-encoder", "--precision", "bf16")
    before = load_file(tiny_encoder / "model.safetensors")
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, before[name]) == name.startswith("roberta."), name


def test_training_goes_on_from_an_exported_model(run_train: RunTrain, tmp_path: Path) -> None:
    first = run_train(tmp_path / "first", "--epochs", 3)
    again = run_train(tmp_path / "again", "--encoder", first / "model", "--epochs", 1, "--lr", 1e-12)
    metric = [line for line in metrics(first) if "split" in line][-1]
    assert [line for line in metrics(again) if "split" in line][-1]["loss"] == pytest.approx(metric["loss"], rel=1e-5)


def test_three_classes_in_other_formats(tiny_encoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": f"word {n} of many", "kind": ["low", "middle", "high"][n % 3]} for n in range(30)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "dev.csv").write_text("text,kind\n" + "".join(f'"{r["text"]}, dev",{r["kind"]}\n' for r in rows))
    columns = ["--text-column", "text", "--label-column", "kind", "--label-names", "low,middle,high"]
    train.main(train_options(tiny_encoder, data, tmp_path / "run", "--epochs", 1, *columns))
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["id2label"]["1"] == "middle"
    assert metrics(tmp_path / "run")[-1]["rows"] == 30


def test_it_learns(run_train: RunTrain, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--epochs", 30, "--dropout", 0, "--lr", 3e-3)
    found = losses(run)
    assert sum(found[-7:]) / 7 < 0.3 < 0.6 < sum(found[:7]) / 7


def test_a_loss_that_explodes_stops_the_run(
    run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--epochs", 5, "--lr", 1e30, "--warmup-ratio", 0, "--max-grad-norm", 0, "--log-every", 1000]
    line = user_error(lambda: run_train(tmp_path / "run", *options), capsys)
    assert "the gradient is not finite at step 2, training rows of this batch" in line
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_tokenizer_of_another_model_is_noticed(
    run_train: RunTrain, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(tiny_encoder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["roberta.embeddings.word_embeddings.weight"] = torch.zeros(100, 32)
    save_file(tensors, other / "model.safetensors")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "vocab_size": 100}))
    line = user_error(lambda: run_train(tmp_path / "run", "--encoder", other), capsys)
    assert "has 100 embedding rows; they do not belong to the same model" in line


def test_a_loss_that_is_not_finite_stops_the_run_though_its_gradient_is(
    run_train: RunTrain, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SingleLabel.loss
    monkeypatch.setattr(SingleLabel, "loss", lambda *arguments: real(*arguments) + math.inf)
    line = user_error(lambda: run_train(tmp_path / "run", "--epochs", 1, "--log-every", 3), capsys)
    assert "loss or gradient is not finite at step 3 or shortly before" in line
    assert not list((tmp_path / "run").glob("checkpoints/*"))


# As a fault of the hardware would do it: the gradient of rank 0 is not finite at some of this process's steps.
POISONED = """
import os
from sst2_xlmr import train
from sst2_xlmr.__main__ import main
real, calls = train.forward_backward, [0]
bad = {int(step) for step in os.environ["BAD_STEPS"].split(",")}
def poisoned(model, batch, loss, world):
    calls[0] += 1
    spoils = calls[0] in bad and world.rank == 0
    return real(model, batch, (lambda *rows: loss(*rows) * float("nan")) if spoils else loss, world)
train.forward_backward = poisoned
main("train")
"""


def run_poisoned(program: Path, bad: str, *words: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run `train.py` as a program that spoils the steps numbered in `bad`."""
    program.write_text(POISONED)
    command = [*launcher(processes), str(program), *map(str, words)]
    environment = {**os.environ, "BAD_STEPS": bad, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False)


def test_a_line_of_metrics_after_a_resume_has_the_last_gradient_norm(
    tiny_encoder: Path, small_data: Path, tmp_path: Path
) -> None:
    """Also where no step was taken between the resume and the line."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = ["--log-every", 3, "--save-every", 2, "--skip-nonfinite", 1, "--epochs", 1, "--keep-checkpoints", 9]
    done = run_poisoned(tmp_path / "p.py", "3", *train_options(tiny_encoder, small_data, whole, *options))
    assert done.returncode == 0, done.stderr
    shutil.copytree(whole, resumed)
    for checkpoint in (resumed / "checkpoints").iterdir():
        if checkpoint.name != "step-00000002":
            shutil.rmtree(checkpoint)
    done = run_poisoned(tmp_path / "p.py", "1", "--resume", "--output-dir", resumed)
    assert done.returncode == 0, done.stderr
    assert logged(resumed) == logged(whole)
    assert logged(resumed)[0]["step"] == 3 and logged(resumed)[0]["grad_norm"] > 0


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_without_a_finite_gradient_are_skipped(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, processes: int
) -> None:
    """Two in a row are allowed and three are not, on every rank alike; a resumed run goes on counting."""

    def run(folder: Path, bad: str, *options: object) -> subprocess.CompletedProcess[str]:
        words = train_options(tiny_encoder, small_data, folder, "--epochs", 2, *options)
        return run_poisoned(tmp_path / "poisoned.py", bad, *words, processes=processes)

    done = run(tmp_path / "skips", "3,9,10", "--skip-nonfinite", 2, "--save-every", 4)
    assert done.returncode == 0, done.stderr
    assert [f"step {step:>6}  gradient is not finite: batch skipped" in done.stdout for step in (3, 9, 10)] == [
        True
    ] * 3
    steps = [line["step"] for line in metrics(tmp_path / "skips") if "split" not in line]
    assert steps == [step for step in range(1, 15) if step not in (3, 9, 10)]
    state = json.loads((tmp_path / "skips" / "checkpoints" / "step-00000014" / "state.json").read_text())["state"]
    assert (state["skipped"], state["skipped_in_row"]) == (3, 0)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "skips").values())

    done = run(tmp_path / "stops", "5,6,7", "--skip-nonfinite", 2, "--save-every", 4)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "the gradient is not finite at step 7 (the last of 3 in a row)" in errors[0]
    expected = next(rows_in_training_order(lengths_of(small_data, tiny_encoder), 8, 0, 0, first=6))
    assert "from 1: " + ", ".join(str(row + 1) for row in expected) + ":" in errors[0]
    assert find_checkpoint(tmp_path / "stops" / "checkpoints", pytest.fail) is not None
    resumed = run(tmp_path / "stops", "0", "--resume", "--skip-nonfinite", 0)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(tmp_path / "stops")[-1]["step"] == 14


def lengths_of(data: Path, encoder: Path) -> np.ndarray:
    """Return the number of tokens of every training row."""
    lines = (data / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    texts = [line.split("\t")[0] for line in lines]
    return load_tokenizer(encoder / "sentencepiece.bpe.model", 64).flat_ids(texts)[1]
