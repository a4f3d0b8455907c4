"""The model's folder: always whole, honest about how the model was trained, and careful with what lies beside it."""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import Patch, RunTrain, metrics, run_export
from safetensors.torch import load_file

from sst2_xlmr import run as run_module
from sst2_xlmr import train
from sst2_xlmr.config import Config
from sst2_xlmr.evaluation.evaluate import Evaluation
from sst2_xlmr.export import folder as hugging_face
from sst2_xlmr.export.folder import card_text, with_note, write_folder
from sst2_xlmr.model.classifier import load_tensors
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.task import MultiLabel, Regression, SingleLabel, Task
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util import versions
from sst2_xlmr.util.files import SCRATCH_MARK, scratch_name


def give_accuracies(monkeypatch: Patch, accuracies: Iterable[float]) -> None:
    """Let evaluations have these accuracies, one after another."""
    evaluate, given = run_module.evaluate, iter(accuracies)

    def evaluate_otherwise(*arguments: Any) -> Evaluation:
        evaluation = evaluate(*arguments)
        return dataclasses.replace(evaluation, metrics={**evaluation.metrics, "accuracy": next(given)})

    monkeypatch.setattr(run_module, "evaluate", evaluate_otherwise)


def test_best_models_in_quick_succession(run_train: RunTrain, tmp_path: Path, monkeypatch: Patch) -> None:
    """Each takes its name in the background; the next must not be written over it meanwhile."""
    put_in_place = hugging_face.put_in_place

    def slowly(new: Path, folder: Path) -> None:
        time.sleep(0.3)
        put_in_place(new, folder)

    give_accuracies(monkeypatch, (number / 100 for number in range(1, 100)))
    monkeypatch.setattr(hugging_face, "put_in_place", slowly)
    run = run_train(tmp_path / "run", "--epochs", 1, "--eval-every", 1)
    assert metrics(run)[-1]["accuracy"] == 0.07
    best, last = (load_file(run / name / "model.safetensors") for name in ("best", "model"))
    assert all(best[name].equal(last[name]) for name in last)
    assert {file.name for file in (run / "best").iterdir()} == {file.name for file in (run / "model").iterdir()}
    assert not list(run.rglob(f"*{SCRATCH_MARK}"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_of_best(run_train: RunTrain, tmp_path: Path, monkeypatch: Patch, precision: str) -> None:
    """However often checkpoints are written."""
    saved = {}
    for name, options in {"often": ["--save-every", 1, "--keep-checkpoints", 9], "once": []}.items():
        with monkeypatch.context() as patched:
            give_accuracies(patched, [0.9, 0.5, 0.5, 0.5])
            run = run_train(tmp_path / name, "--epochs", 1, "--eval-every", 2, "--precision", precision, *options)
        saved[name] = load_file(run / "best" / "model.safetensors")
    checkpoint = load_file(tmp_path / "often" / "checkpoints" / "step-00000002" / "model.safetensors")
    assert saved["once"]["classifier.dense.weight"].equal(checkpoint["head.dense.weight"])
    assert all(saved["once"][name].equal(weights) for name, weights in saved["often"].items())


@pytest.mark.parametrize("freeze", [False, True])
def test_config_has_the_dropout_of_training(run_train: RunTrain, tmp_path: Path, freeze: bool) -> None:
    """Dropout also of a frozen encoder, which had none: that is what to train on with. And if it is exported again.

    Without the other settings, versions that are not tested here drop most of tokenizer.json, or warn of it.
    """
    options = ["--dropout", 0.25, "--head-dropout", 0.5, "--max-steps", 1, *(["--freeze-encoder"] if freeze else [])]
    model = run_train(tmp_path / "run", *options) / "model"
    run_export("--model", model, "--format", "hf", "--output", tmp_path / "again")
    settings, again = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "again"))
    assert settings["hidden_dropout_prob"] == settings["attention_probs_dropout_prob"] == 0.25
    assert (settings["classifier_dropout"], settings["transformers_version"]) == (0.5, "4.48.3")
    assert again == settings
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


def test_what_the_user_has_beside_a_model_stays(run_train: RunTrain, model: Path, tmp_path: Path) -> None:
    """Whatever its name, in a run's folder and elsewhere; only what has our mark is cleaned up."""
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
    encoder = find_encoder(str(model))
    for _ in range(2):  # also where it is replaced
        write_folder(tmp_path / "reviews", load_tensors(encoder), encoder)
    assert all((folder / "kept.txt").is_file() for folder in theirs)
    assert not any(folder.exists() for folder in ours)
    assert {file.name for file in tmp_path.iterdir()} == {*(f.name for f in theirs[:3]), "data", "run", "reviews"}


def test_a_note_replaces_the_one_before() -> None:
    card = "What it is.\n\nCalibrated: by training.\n"
    for number in range(2):
        noted = with_note(card, f"Calibrated: temperature {number}.", previous="Calibrated: temperature")
        assert noted == f"What it is.\n\nCalibrated: by training.\n\nCalibrated: temperature {number}.\n"
    assert with_note("", "Calibrated.") == ""


def test_card_of_a_run(run_train: RunTrain, small_data: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """Each folder's with the metrics of its own weights, here the first evaluation is the best of two; and no path."""
    give_accuracies(monkeypatch, [0.9, 0.5, 0.6, 0.7])
    shutil.copy(small_data / "dev.tsv", small_data / "other.tsv")
    with (small_data / "train.tsv").open("a") as file:
        file.write("\t1\n")
    options = ["--eval-every", 7, "--test-file", small_data / "other.tsv", "--drop-unusable"]
    run = run_train(tmp_path / "run", "--epochs", 2, *options)
    cards = {name: (run / name / "README.md").read_text(encoding="utf-8") for name in ("best", "model")}
    entries = {(entry["step"], entry["split"]): entry for entry in metrics(run) if "split" in entry}
    rows = {}
    for (step, split), entry in entries.items():
        interval = f"{entry['accuracy_low']:.4f}-{entry['accuracy_high']:.4f}"
        numbers = [f"{entry[key]:.4f}" for key in ("accuracy", "macro_f1", "ece", "loss")]
        rows[step, split] = f"| {' | '.join([split, '20', numbers[0], interval, *numbers[1:]])} |\n"
    head = "\n| file | rows | accuracy | 95 % interval | macro F1 | ECE | loss |\n" + "| --- " * 7 + "|\n"
    assert f"{head}{rows[7, 'dev']}\nThese weights were chosen by their accuracy on dev, " in cards["best"]
    assert f"{head}{rows[14, 'dev']}{rows[14, 'other']}\n## Settings" in cards["model"]
    for text in (
        "tiny, fine-tuned with sst2_xlmr for 14 steps",
        "50 train rows, 20 dev rows, 20 other rows, 1 without text left out of train; from data, other.tsv.",
        "| `--lr` | 0.001 |",
        "| `--freeze-encoder` | off |",
        versions.versions(),
    ):
        assert text in cards["model"]
    for card, own in ((cards["best"], [(7, "dev")]), (cards["model"], [(14, "dev"), (14, "other")])):
        header = next(line for line in card.splitlines() if line.startswith("model-index: "))
        results = json.loads(header.partition(" ")[2])[0]["results"]
        shown = {result["dataset"]["name"]: [each["value"] for each in result["metrics"]] for result in results}
        assert shown == {key[1]: [entries[key]["accuracy"], entries[key]["macro_f1"]] for key in own}
        assert card.startswith("---\nlibrary_name: transformers\n")
        assert str(tmp_path) not in card and "/" not in card.split("## Data")[1]


def test_card_of_a_bundle_names_its_hub_repository_and_shortens_many_classes() -> None:
    many = SingleLabel([f"c{number}" for number in range(50)])
    state = TrainState(5, step=3, temperature=1.5, ece_before=0.25, ece_after=0.125)
    card = card_text(Config(text_column=["a|b"]), many, state, ["5 train rows"], {})
    assert "base_model: FacebookAI/xlm-roberta-base\ntags: " in card
    assert "# Text classifier: 50 classes\n" in card
    assert "5 train rows; from SST-2 of the GLUE benchmark." in card
    assert "| `--text-column` | a\\|b |" in card
    config = Config(data_dir="/films", eval_file=["fr=/fr.tsv"], test_file=["/de.tsv"], calibrate=True, best_by="loss")
    two = SingleLabel(["a", "b"])
    card = card_text(config, two, state, ["5 train rows", "2 fr rows"], {})
    assert "; from films, fr.tsv, de.tsv." in card
    note = "calibrated on dev: temperature 1.500, ECE 0.2500 before, 0.1250 with it on the rows it was fitted to."
    assert f"{note}\n\n## Settings" in card
    card = card_text(config, two, dataclasses.replace(state, temperature=1.0), ["5 train rows"], {}, is_best=True)
    assert "chosen by their loss on dev" in card
    assert "calibrated on dev: temperature 1, as no other is significantly better on these rows;" in card


def test_card_lists_the_metrics_of_its_task() -> None:
    tasks: list[Task] = [SingleLabel(["a", "b"]), MultiLabel(["a", "b"]), Regression(["score"])]
    for task, types in zip(tasks, ("accuracy, f1", "f1", "spearmanr, pearsonr")):
        assert f"\nmetrics: [{types}]\n" in card_text(Config(), task, TrainState(1), ["5 train rows"], {})
