"""The model's folder: always whole, and honest about how the model was trained."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import metrics
from safetensors.torch import load_file

from sst2_xlmr import train
from sst2_xlmr.evaluation.evaluate import Evaluation
from sst2_xlmr.export import folder as hugging_face
from sst2_xlmr.programs import evaluate
from sst2_xlmr.util.files import SCRATCH_MARK, scratch_name

RunTrain = Callable[..., Path]


def test_better_models_in_quick_succession_leave_a_whole_one(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes its name in the background; the next must not be written over it meanwhile."""
    evaluate, put_in_place = train.evaluate, hugging_face.put_in_place
    accuracies = iter(range(1, 100))

    def ever_better(*arguments: Any) -> Evaluation:
        evaluation = evaluate(*arguments)
        return dataclasses.replace(evaluation, metrics={**evaluation.metrics, "accuracy": next(accuracies) / 100})

    def slowly(new: Path, folder: Path) -> None:
        time.sleep(0.3)
        put_in_place(new, folder)

    monkeypatch.setattr(train, "evaluate", ever_better)
    monkeypatch.setattr(hugging_face, "put_in_place", slowly)
    run = run_train(tmp_path / "run", "--epochs", 1, "--eval-every", 1)
    assert metrics(run)[-1]["accuracy"] == 0.07
    best, last = (load_file(run / name / "model.safetensors") for name in ("best", "model"))
    assert all(best[name].equal(last[name]) for name in last)
    assert {file.name for file in (run / "best").iterdir()} == {file.name for file in (run / "model").iterdir()}
    assert not list(run.rglob(f"*{SCRATCH_MARK}"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_best_has_the_weights_of_its_step(
    run_train: RunTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """However often checkpoints are written."""
    evaluate = train.evaluate

    def first_is_best(*arguments: Any) -> Evaluation:
        evaluation = evaluate(*arguments)
        return dataclasses.replace(evaluation, metrics={**evaluation.metrics, "accuracy": next(accuracies)})

    monkeypatch.setattr(train, "evaluate", first_is_best)
    saved = {}
    for name, options in {"often": ["--save-every", 1, "--keep-checkpoints", 9], "once": []}.items():
        accuracies = iter([0.9, 0.5, 0.5, 0.5])
        run = run_train(tmp_path / name, "--epochs", 1, "--eval-every", 2, "--precision", precision, *options)
        saved[name] = load_file(run / "best" / "model.safetensors")
    checkpoint = load_file(tmp_path / "often" / "checkpoints" / "step-00000002" / "model.safetensors")
    assert saved["once"]["classifier.dense.weight"].equal(checkpoint["head.dense.weight"])
    assert all(saved["once"][name].equal(weights) for name, weights in saved["often"].items())


@pytest.mark.parametrize("freeze", [False, True])
def test_config_has_the_dropout_of_training(run_train: RunTrain, tmp_path: Path, freeze: bool) -> None:
    """Also of a frozen encoder, which had none: that is what to train on with."""
    options = ["--dropout", 0.25, "--head-dropout", 0.5, "--max-steps", 1, *(["--freeze-encoder"] if freeze else [])]
    settings = json.loads((run_train(tmp_path / "run", *options) / "model" / "config.json").read_text())
    assert settings["hidden_dropout_prob"] == settings["attention_probs_dropout_prob"] == 0.25
    assert settings["classifier_dropout"] == 0.5


def test_what_the_user_has_beside_a_model_stays(
    run_train: RunTrain, model: Path, small_data: Path, tmp_path: Path
) -> None:
    """Whatever its name, in a run's folder and beside --output; only what has our mark is cleaned up."""
    run = run_train(tmp_path / "run", "--epochs", 1, "--save-every", 3)
    theirs = [
        *(tmp_path / name for name in ("reviews.old", "reviews.tmp", "reviews.sst2_xlmr")),
        *(run / name for name in ("best.old", "model.old", "model.tmp", ".best.new.sst2_xlmr", "mine.tmp")),
        *(run / "checkpoints" / name for name in ("step-00000007.tmp", "step-00000003.old")),
    ]
    ours = [scratch_name(run / "best"), scratch_name(run / "model", "old"), scratch_name(run / "checkpoints" / "x")]
    for folder in (*theirs, *ours):
        folder.mkdir()
        (folder / "kept.txt").touch()
    train.main(["--resume", "--output-dir", str(run)])
    options = ["--calibrate", small_data / "dev.tsv", "--output", tmp_path / "reviews"]
    evaluate.main(["--model", *map(str, [model, *options])])
    assert all((folder / "kept.txt").is_file() for folder in theirs)
    assert not any(folder.exists() for folder in ours)
    assert (tmp_path / "reviews" / "model.safetensors").is_file()
