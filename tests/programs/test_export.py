"""What training and scripts/export.py write: the folder with its card, and the TorchScript file."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, metrics, needs_small_encoder, sst2_sentences, user_error
from reference import needs_torchtext
from safetensors.torch import load_file

from sst2_xlmr.config import Config
from sst2_xlmr.evaluation.calibration import Calibration
from sst2_xlmr.evaluation.evaluate import predict
from sst2_xlmr.export.model_card import card_text
from sst2_xlmr.model.classifier import load_classifier
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.programs import export
from sst2_xlmr.training.state import Progress
from sst2_xlmr.util import versions
from sst2_xlmr.util.errors import UserError

sys.path.insert(0, str(ROOT / "scripts"))


# torch ignores it by itself, pytest does not: torch.nn.functional looks at a size that never changes.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

CPU = torch.device("cpu")
TEXTS = ["A fine film.", "", "word " * 300, "  It was  slow,\tand long ", "Кино 映画 ταινία", "no"] * 12

# Runs where sst2_xlmr cannot be imported: argv is the file, a JSON list of texts, and where the answers go.
USE_ALONE = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sst2_xlmr", "train", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch, torchtext
classify = torch.jit.load(sys.argv[1])
labels, probabilities = classify(json.load(open(sys.argv[2])))
assert classify([])[0] == [] and classify([])[1].shape == (0, len(classify.label_names))
json.dump([labels, probabilities.tolist(), classify.label_names], open(sys.argv[3], "w"))
"""


def run_export(*options: object) -> None:
    export.main([str(option) for option in options])


def probabilities_of(model: Path, texts: list[str]) -> torch.Tensor:
    classifier, tokenizer, _ = load_classifier(model, CPU, bf16=False)
    return predict(classifier, tokenizer(texts), 256, CPU)


@needs_torchtext
def test_torchscript_answers_alike_without_this_package(model: Path, tmp_path: Path) -> None:
    options = ["--model", model, "--format", "torchscript", "--output", tmp_path / "new" / "classifier.pt"]
    command: list[object] = [sys.executable, ROOT / "scripts" / "export.py", *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert "same answers on 30 rows" in done.stdout
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["classifier.pt"]

    labels = check_alone(model, tmp_path / "new" / "classifier.pt", TEXTS, tmp_path)
    assert len(set(labels)) == 2, "the texts must tell the labels apart"


def check_alone(model: Path, file: Path, texts: list[str], scratch: Path) -> list[str]:
    """Check the file's answers in a process that has no other package of ours; returns its labels."""
    (scratch / "texts").write_text(json.dumps(texts))
    words = [sys.executable, "-W", "ignore", "-c", USE_ALONE, str(file), "texts", "answers"]
    env = {**os.environ, "PYTHONPATH": ""}
    alone = subprocess.run(words, cwd=scratch, env=env, capture_output=True, check=False)
    assert (alone.returncode, alone.stderr) == (0, b"")
    labels, probabilities, label_names = json.loads((scratch / "answers").read_text())
    expected = probabilities_of(model, texts)
    torch.testing.assert_close(torch.tensor(probabilities), expected, atol=1e-5, rtol=0)
    assert labels == [label_names[index] for index in expected.argmax(-1).tolist()]
    return labels


@needs_torchtext
@pytest.mark.slow
@needs_small_encoder
def test_torchscript_on_sst2(trained_small_model: Path, tmp_path: Path) -> None:
    run_export("--model", trained_small_model, "--format", "torchscript", "--output", tmp_path / "classifier.pt")
    labels = check_alone(trained_small_model, tmp_path / "classifier.pt", sst2_sentences(), tmp_path)
    assert set(labels) == {"negative", "positive"}


@needs_torchtext
def test_torchscript_cuts_long_texts_at_the_models_length(model: Path, tmp_path: Path) -> None:
    from sst2_xlmr.export.torchscript import save_torchscript

    classifier, tokenizer, names = load_classifier(model, CPU, bf16=False)
    tokenizer.max_length = 8
    save_torchscript(classifier, tokenizer, names, tmp_path / "x.pt")
    loaded = torch.jit.load(tmp_path / "x.pt")
    text = "one two three four five six seven eight nine ten"
    assert torch.equal(loaded([text])[1], loaded([text + " eleven"])[1])


@needs_torchtext
def test_torchscript_takes_pairs(model: Path, tmp_path: Path) -> None:
    from sst2_xlmr.export.torchscript import save_torchscript

    classifier, tokenizer, names = load_classifier(model, CPU, bf16=False)
    pairs = [f"{text} again" for text in reversed(TEXTS)]
    expected = predict(classifier, tokenizer(TEXTS, pairs), 256, CPU)
    save_torchscript(classifier, tokenizer, names, tmp_path / "x.pt")
    found = torch.jit.load(tmp_path / "x.pt")(TEXTS, pairs)
    torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=0)
    assert found[0] == [names[index] for index in expected.argmax(-1).tolist()]


def test_folder_is_rewritten_with_its_card(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))
    (source / "README.md").write_text("what it is")
    (tmp_path / "texts.txt").write_text("A fine film.\nEin guter Film.\n", encoding="utf-8")
    options = ["--check-file", tmp_path / "texts.txt", "--output", tmp_path / "copy"]
    run_export("--model", source, "--format", "hf", *options)
    assert "same answers on 2 rows, probabilities within 0" in capsys.readouterr().out
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == sorted(f.name for f in source.iterdir())
    assert (tmp_path / "copy" / "README.md").read_text() == "what it is"


def test_the_card_says_8_bits_once_and_only_of_such_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the folder is written again, in whatever form."""
    monkeypatch.setattr(export, "classify_with_folder", lambda *_: None)
    evaluate = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))
    source = Path(shutil.copytree(model, tmp_path / "source"))
    (source / "README.md").write_text("What it is.\n\nThe probabilities are calibrated: by training.\n")

    def card_after(folder: Path, name: str, int8: bool) -> str:
        export.write_hugging_face(find_encoder(str(folder)), tmp_path / name, "fp32", int8)
        return (tmp_path / name / "README.md").read_text()

    plain, note = (source / "README.md").read_text(), "The encoder's matrices are stored in 8 bits.\n"
    assert card_after(source, "once", int8=True) == f"{plain}\n{note}"
    assert card_after(tmp_path / "once", "twice", int8=True) == f"{plain}\n{note}"
    assert card_after(tmp_path / "twice", "back", int8=False) == plain
    for number in range(2):
        evaluate["write_calibrated"](tmp_path / "once", tmp_path / f"{number}", Calibration(1.5, 0.2, 0.1))
        card = (tmp_path / f"{number}" / "README.md").read_text()
        assert card.startswith(plain + "\nThe probabilities are calibrated: temperature 1.500")
        assert card.count("calibrated: temperature") == 1
        assert note not in card
        export.write_hugging_face(find_encoder(str(tmp_path / f"{number}")), tmp_path / "once", "fp32", True)


@pytest.mark.parametrize(
    ("header", "options", "says"),
    [
        ("text\tlabel", ["--label-column", "kind"], "no column 'kind' among text, label"),
        ("text\tlabel\tlabel", ["--label-column", "label"], "two columns are named 'label'"),
        ("text\tkind", ["--most-lost", "1"], "--most-lost: no labels in rows; name their column with --label-column"),
    ],
)
def test_accuracy_is_not_left_out_where_it_was_asked_for(
    model: Path, tmp_path: Path, header: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.tsv").write_text(f"{header}\n" + "\t".join(["fine", "a", "a"][: header.count("\t") + 1]) + "\n")
    paths: list[object] = ["--check-file", tmp_path / "rows.tsv", "--output", tmp_path / "x"]
    assert says in user_error(lambda: run_export("--model", model, "--format", "hf-int8", *paths, *options), capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.tsv"]


def test_accuracy_that_was_not_compared_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classify = export.classify_with_folder
    monkeypatch.setattr(export, "classify_with_folder", lambda folder, *_: classify(folder))  # on any processor
    (tmp_path / "rows.tsv").write_text("text\tlabel\nfine\ta\n")
    (tmp_path / "lines.txt").write_text("fine\n")
    options = ["--check-file", tmp_path / "rows.tsv", tmp_path / "lines.txt", "--most-changed", 100, "--most-lost", 100]
    run_export("--model", model, "--format", "hf-int8", "--output", tmp_path / "x", *options)
    said = capsys.readouterr().out
    assert "no labels in lines: accuracy was not compared" in said
    assert said.count("not compared") == 1


def test_folder_in_bf16(model: Path, tmp_path: Path) -> None:
    run_export("--model", model, "--format", "hf", "--dtype", "bf16", "--output", tmp_path / "copy")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("form", ["hf", pytest.param("torchscript", marks=needs_torchtext)])
def test_what_answers_otherwise_is_removed(
    model: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(written: Any) -> Any:
        def write(*given: Any) -> Any:
            classify = written(*given)
            return lambda rows: classify(rows) + torch.tensor([2e-5, -2e-5])

        return write

    monkeypatch.setattr(export, "write_hugging_face", spoil(export.write_hugging_face))
    monkeypatch.setattr(export, "write_torchscript", spoil(export.write_torchscript))
    output = tmp_path / "out" / "x"
    options = ["--model", model, "--format", form, "--output", output]
    assert "a probability differs by 2e-05; it was removed" in user_error(lambda: run_export(*options), capsys)
    assert not list(output.parent.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--format", "gguf"], "invalid choice: 'gguf'"),
        (["--format", "hf", "--dtype", "fp16"], "invalid choice: 'fp16'"),
        (["--format", "torchscript", "--dtype", "bf16"], "--dtype bf16 is for --format hf"),
        (["--format", "hf", "--check-file", "no/such"], "cannot read no/such as UTF-8 text"),
        (["--format", "hf", "--check-file", "no.tsv"], "cannot read no.tsv: No such file"),
        (["--format", "hf", "--check-file", "empty"], "empty is empty"),
        (["--format", "hf", "--check-file", "a/empty", "empty"], "two files have the name empty"),
        (["--format", "hf", "--keep-vocabulary-of", "no.csv"], "cannot read no.csv: No such file"),
        (["--format", "hf", "--from-ids"], "--from-ids is for --format onnx"),
        (["--format", "hf-int8"], "--format hf-int8 needs --check-file"),
        (["--format", "hf", "--most-changed", "101"], "'101' is not a percentage from 0 to 100"),
        (["--format", "hf", "--most-changed", "5"], "are for formats in 8 bits"),
        (["--format", "hf", "--text-column", "x"], "--text-column needs a .tsv, .csv or .jsonl file"),
        (["--format", "hf", "--check-file", "empty", "--text-column", "x"], "--text-column needs a .tsv, .csv"),
        (["--format", "hf", "--output", "empty"], "--output empty is there already"),
        (["--format", "hf", "--output", "empty/x"], "cannot write empty/x: "),
        (["--format", "hf", "--model", "no/such"], "no/such: neither"),
        ([], "--format"),
    ],
)
def test_wrong_use(
    model: Path,
    tmp_path: Path,
    options: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    assert says in user_error(lambda: run_export("--model", model, "--output", "x", *options), capsys)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty"]


def test_an_encoder_without_head_and_a_runs_folder_are_refused(
    tiny_encoder: Path, run_train: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no classification head"):
        run_export("--model", tiny_encoder, "--format", "hf", "--output", tmp_path / "x")
    run = run_train(tmp_path / "run", "--max-steps", 1)
    with pytest.raises(UserError, match="is the folder of a run; give the model in it, .*run/model"):
        find_encoder(str(run))
    with pytest.raises(UserError, match="step-00000001 is a checkpoint, .*; give best or model in the run's folder"):
        find_encoder(str(run / "checkpoints" / "step-00000001"))


def test_torchscript_is_refused_without_torchtext(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "has_torchtext", lambda: False)
    options = ["--model", str(model), "--format", "torchscript", "--output", str(tmp_path / "x.pt")]
    line = user_error(lambda: export.main(options), capsys)
    assert "--format torchscript needs torchtext under torch 2.3.1, and this is torch" in line


def test_training_writes_a_card_without_paths(run_train: Callable[..., Path], small_data: Path, tmp_path: Path) -> None:
    shutil.copy(small_data / "dev.tsv", small_data / "other.tsv")
    options = ["--epochs", 2, "--test-file", small_data / "other.tsv"]
    run = run_train(tmp_path / "run", *options)
    cards = {name: (run / name / "README.md").read_text(encoding="utf-8") for name in ("best", "model")}
    entries = [line for line in metrics(run) if "split" in line]
    dev = {line["step"]: line for line in entries if line["split"] == "dev"}
    assert f"| other.tsv | 20 | {entries[-1]['accuracy']:.4f}" not in cards["best"], "best/ is older than that"
    for text in (
        "tiny, fine-tuned with sst2_xlmr for 14 steps",
        "50 rows train, 20 rows dev, 20 rows other; from data, other.tsv.",
        f"| dev | 20 | {dev[14]['accuracy']:.4f} | {dev[14]['macro_f1']:.4f} | {dev[14]['loss']:.4f} |",
        f"| other | 20 | {entries[-1]['accuracy']:.4f} |",
        "| `--lr` | 0.001 |",
        "| `--freeze-encoder` | off |",
        versions.versions(),
    ):
        assert text in cards["model"]
    for card in cards.values():
        assert card.startswith("---\nlibrary_name: transformers\n")
        assert str(tmp_path) not in card
        assert "/" not in card.split("## Data")[1]


def test_card_of_a_bundle_names_its_hub_repository_and_shortens_many_classes() -> None:
    progress = Progress("", "", 1, step=3)
    card = card_text(Config(text_column="a|b"), [f"c{n}" for n in range(50)], {"train": 5}, [], progress)
    assert "base_model: FacebookAI/xlm-roberta-base\n" in card
    assert "# Text classifier: 50 classes\n" in card
    assert "5 rows train; from SST-2 of the GLUE benchmark." in card
    given = Config(data_dir="/data/films", eval_file=["fr=/data/fr.tsv"], test_file=["/data/de.tsv"])
    assert "; from films, fr.tsv, de.tsv." in card_text(given, ["a", "b"], {"train": 5, "fr": 2, "de": 2}, [], progress)
    assert "| `--text-column` | a\\|b |" in card


def test_a_model_that_is_exported_again_keeps_its_settings(run_train: Callable[..., Path], tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--dropout", 0.25, "--head-dropout", 0.5, "--max-steps", 1)
    run_export("--model", run / "model", "--format", "hf", "--output", tmp_path / "again")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (run / "model", tmp_path / "again"))
    assert after == before
