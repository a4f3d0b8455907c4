"""scripts/evaluate.py as it is used."""

import itertools
import json
import math
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLE_DATA, Capture, Patch, change_weights, file_size_limit, metrics, train_options, user_error
from running import events_in

import sst2_xlmr
from sst2_xlmr import train
from sst2_xlmr.config import named_file
from sst2_xlmr.programs import evaluate as script
from sst2_xlmr.programs import export, predict

DE, RU = SAMPLE_DATA / "test.de.tsv", SAMPLE_DATA / "test.ru.tsv"
LAST_LAYER, EMBEDDING = "classifier.out_proj.weight", "roberta.embeddings.word_embeddings.weight"
DENSE = "roberta.encoder.layer.0.output.dense.weight"


@pytest.fixture(scope="module")
def run(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated on two files."""
    folder = tmp_path_factory.mktemp("evaluate")
    files = ["--eval-file", f"de={DE}", f"ru={RU}"]
    train.main(train_options(tiny_encoder, SAMPLE_DATA, folder / "run", "--max-steps", 60, "--lr", 3e-3, *files))
    return folder / "run"


def evaluate(*options: object) -> None:
    script.main(["--device", "cpu", "--precision", "fp32", *map(str, options)])


@pytest.mark.parametrize("names", [["0", "1"], ["LABEL_0", "LABEL_1"]])
def test_sst2s_numbers_are_those_of_a_model_without_names(run: Path, tmp_path: Path, names: list[str]) -> None:
    sst2 = tmp_path / "dev.tsv"  # with the space at the end of every text
    sst2.write_text("sentence\tlabel\n" + "a fine film \t1\n" * 2 + "a poor film \t0\n", encoding="utf-8")
    shutil.copytree(run / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    settings.update(id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)})
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for model in (run / "model", tmp_path / "model"):
        evaluate("--model", model, "--file", sst2, "--json", tmp_path / f"{model.parent.name}.json")
    other = tmp_path / "other.tsv"  # with numbers that the options name
    other.write_text(sst2.read_text(encoding="utf-8").replace("\t1", "\t7").replace("\t0", "\t9"), encoding="utf-8")
    options = ["--file", f"dev={other}", "--json", tmp_path / "other.json", "--label-names", "7=positive,9=negative"]
    evaluate("--model", run / "model", *options)
    found = json.loads((tmp_path / f"{tmp_path.name}.json").read_text(encoding="utf-8"))["files"]["dev"]
    expected = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["files"]["dev"]
    named = json.loads((tmp_path / "other.json").read_text(encoding="utf-8"))["files"]["dev"]
    assert found["confusion"] == named["confusion"] == expected["confusion"]
    assert list(found["classes"]) == names
    options = ["--model", tmp_path / "model", "--format", "onnx", "--check-file", sst2]
    export.main(["--output", str(tmp_path / "model.onnx"), *map(str, options)])


def test_an_empty_text_is_answered_unless_it_is_dropped(run: Path, tmp_path: Path) -> None:
    (file := tmp_path / "de.tsv").write_text("sentence\tlabel\na fine film\tpositive\n\tnegative\n", encoding="utf-8")
    for name, rows, options in (("all", 2, []), ("usable", 1, ["--drop-unusable"])):
        evaluate("--model", run / "model", "--file", file, "--json", tmp_path / name, *options)
        assert json.loads((tmp_path / name).read_text(encoding="utf-8"))["files"]["de"]["rows"] == rows


def test_numbers_are_those_of_training(run: Path, tmp_path: Path, capsys: Capture) -> None:
    file, events, few = tmp_path / "numbers.json", tmp_path / "events", tmp_path / "few.tsv"
    few.write_text("".join(RU.read_text(encoding="utf-8").splitlines(keepends=True)[:8]), encoding="utf-8")
    outputs = ["--json", file, "--tensorboard", events]
    evaluate("--model", run / "model", "--file", f"de={DE}", "--file", f"ru={RU}", few, *outputs)
    said, errors = capsys.readouterr()
    assert errors == ""
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["labels"] == ["negative", "positive"]
    assert list(content["files"]) == ["de", "ru", "few"]
    expected = {entry["split"]: entry for entry in metrics(run) if "split" in entry}
    for name, path in (("de", DE), ("ru", RU)):
        found = content["files"][name]
        assert found["file"] == str(path)
        for key in ("rows", "accuracy", "accuracy_low", "accuracy_high", "macro_f1"):
            assert found[key] == expected[name][key], key
        for key in ("loss", "ece"):
            assert found[key] == pytest.approx(expected[name][key], rel=1e-4), key
        assert found["classes"]["positive"]["precision"] == expected[name]["precision"][1]
        assert found["classes"]["negative"]["recall"] == expected[name]["recall"][0]
        assert [sum(row) for row in found["confusion"]] == [c["support"] for c in found["classes"].values()]
    accuracies = [found["accuracy"] for found in content["files"].values()]
    assert content["mean"]["accuracy"] == pytest.approx(sum(accuracies) / 3), "however many rows they have"
    assert content["mean"].keys() == {"loss", "accuracy", "macro_f1", "ece"}, "an interval has no mean"

    table, of_de = ([line.split() for line in part.splitlines()] for part in said.split("\n\n")[:2])
    assert [line[:2] for line in table[1:4]] == [[n, f"{a:.4f}"] for n, a in zip(content["files"], accuracies)]
    assert [line[0] for line in of_de] == ["de", "negative", "positive"]
    assert [[int(count) for count in line[5:]] for line in of_de[1:]] == content["files"]["de"]["confusion"]

    tags = events_in(events).Tags()
    assert {"de/accuracy", "ru/ece", "few/loss"} <= set(tags["scalars"])
    assert {"de/confusion", "ru/confusion"} <= set(tags["images"])
    assert {"de/pr_positive", "de/mistakes/text_summary"} <= set(tags["tensors"])


def test_a_precision_is_compared_with_another(run: Path, capsys: Capture) -> None:
    options = ["--model", run / "model", "--file", f"de={DE}", f"ru={RU}"]
    evaluate(*options, "--precision", "bf16", "--against", "fp32", "--most-changed", 100, "--most-lost", 100)
    table = [line.split() for line in capsys.readouterr().out.split("\n\n")[-1].splitlines()]
    assert [line[0] for line in table] == ["file", "de", "ru", "all"]
    assert [line[-1] for line in table[1:]] == ["40", "40", "80"]


@pytest.mark.parametrize("output", [os.devnull, "/dev/full"])
def test_too_many_changes_are_refused(run: Path, output: str, monkeypatch: Patch) -> None:
    """Whoever reads the table. All labels are turned around, since the model may give all rows the same one."""
    compare = script.compare_files

    def turned_around(task: Any, predictions: Any) -> Any:
        return compare(task, {name: (1 - found, *others) for name, (found, *others) in predictions.items()})

    monkeypatch.setattr(script, "compare_files", turned_around)
    options = ["--model", run / "model", "--file", f"de={DE}", f"ru={RU}", "--precision", "bf16", "--against", "fp32"]
    with suppress(OSError), Path(output).open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        line = user_error(evaluate, *options)
    assert "bf16 changes 80 of 80 labels of fp32, 100.00% (limit 1.00%); use fp32, or raise --most-changed" in line


@pytest.mark.parametrize("what", ["output", "events"])
def test_a_full_disk(run: Path, tmp_path: Path, what: str, monkeypatch: Patch) -> None:
    options = ["--model", run / "model", "--file", DE, *(["--tensorboard", tmp_path] if what == "events" else [])]
    evaluate("--model", run / "model", "--file", DE)  # so that the token cache is there, which would not fit either
    # Of TensorBoard's file only so much fits.
    with suppress(OSError), Path("/dev/full" if what == "output" else os.devnull).open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with file_size_limit(4000 if what == "events" else 1 << 30):
            line = user_error(evaluate, *options)
    assert f"cannot write {tmp_path if what == 'events' else 'the output'}: " in line


def test_weights_that_are_not_finite_are_refused(run: Path, tmp_path: Path) -> None:
    """Also if no text uses them."""
    model = change_weights(run / "model", tmp_path / "a", lambda found: found[EMBEDDING][-1].fill_(math.nan))
    assert f"{model} has weights that are not finite" in user_error(sst2_xlmr.load, model)
    # These are finite, but what they compute is not.
    model = change_weights(run / "model", tmp_path / "b", lambda found: found[DENSE].fill_(3e38))
    has_int8 = sst2_xlmr.load(run / "model", "int8", "cpu").precision == "int8"
    for precision, main in itertools.product(("fp32", "bf16", *["int8"] * has_int8), (script.main, predict.main)):
        words = ["--model", model, "--device", "cpu", "--precision", precision]
        words += ["x"] if main == predict.main else ["--file", DE]
        assert f"{model}: the model's outputs are not finite" in user_error(main, list(map(str, words)))


def test_a_calibrated_model_is_as_it_was_said(run: Path, tmp_path: Path, capsys: Capture) -> None:
    """The ECE that is printed is what the written folder has; folders beside it stay, and so does one that exists."""
    # Overconfident.
    source = change_weights(run / "model", tmp_path / "source", lambda found: found[LAST_LAYER].mul_(20))
    with (source / "README.md").open("a", encoding="utf-8") as card:
        card.write("\nThe probabilities are calibrated on dev: temperature 3.000.\n")
    output = tmp_path / "models" / "reviews"
    beside = [output.with_name(f"reviews.{end}") / "precious" for end in ("old", "tmp")]
    for file in beside:
        file.parent.mkdir(parents=True)
        file.touch()
    calibrate = ["--model", source, "--calibrate", SAMPLE_DATA / "train.tsv", "--output", output, "--precision", "bf16"]
    evaluate(*calibrate)
    said = re.search(r"temperature (\S+), ECE (\S+) before, (\S+) with it", capsys.readouterr().out)
    assert said is not None
    notes = re.findall("^The probabilities are .*$", (output / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(notes) == 1 and notes[0].startswith(f"The probabilities are calibrated on train.tsv: {said[0]}")
    assert sorted(path.name for path in output.parent.iterdir()) == ["reviews", "reviews.old", "reviews.tmp"]
    assert all(file.is_file() for file in beside)
    found = []
    for model in (source, output):
        options = ["--file", f"dev={SAMPLE_DATA / 'train.tsv'}", "--precision", "bf16", "--json", f"{model}.json"]
        evaluate("--model", model, *options)
        found.append(json.loads(Path(f"{model}.json").read_text(encoding="utf-8"))["files"]["dev"])
    assert [f"{each['ece']:.4f}" for each in found] == [said[2], said[3]]
    assert found[1]["loss"] < found[0]["loss"]
    assert found[1]["accuracy"] == found[0]["accuracy"]
    before = (output / "model.safetensors").stat().st_mtime_ns
    assert f"--output {output} already exists" in user_error(evaluate, *calibrate)
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_json_that_exists_is_replaced_only_if_asked(run: Path, tmp_path: Path) -> None:
    """Never through a link."""
    file, link = tmp_path / "x.json", tmp_path / "link.json"
    file.write_text("precious")
    link.symlink_to(file)
    options = ["--model", run / "model", "--file", DE]
    for given in (file, link):
        assert f"--json {given} already exists; choose another name" in user_error(evaluate, *options, "--json", given)
    evaluate(*options, "--json", link, "--overwrite")
    assert file.read_text() == "precious" and not link.is_symlink()
    evaluate(*options, "--json", file, "--overwrite")
    assert json.loads(file.read_text())["files"].keys() == {"test.de"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give either --file"),
        (["--file", "no.tsv"], "no.tsv does not exist"),
        (["--file", DE, DE], "two files have the name test.de"),
        (["--file", DE, "--device", "cuda"], "no CUDA GPU"),
        (["--file", DE, "--json", "{tmp}/no/x"], "no/x: No such file"),
        (["--file", DE, "--tensorboard", DE], "cannot write "),
        (["--file", DE, "--precision", "fp32", "--against", "fp32"], "--against fp32 compares fp32 with itself"),
        (["--file", DE, "--overwrite"], "--overwrite needs the --json"),
        (["--calibrate", DE], "--calibrate FILE and --output DIR belong together"),
        (["--calibrate", DE, "--output", "{tmp}/x", "--json", "y"], "--json, --tensorboard and --against are for"),
        (["--calibrate", DE, "--output", "{tmp}/x", "--precision", "int8"], "calibrate in fp32 or bf16"),
    ],
)
def test_wrong_use(run: Path, tmp_path: Path, options: list[object], says: str) -> None:
    words = [str(option).replace("{tmp}", str(tmp_path)) for option in options]
    assert says in user_error(evaluate, "--model", run / "model", *words)


def test_names_of_files() -> None:
    names = {
        "de=a/b.tsv": ("de", "a/b.tsv"),
        "rows.jsonl.gz": ("rows", "rows.jsonl.gz"),
        "./x=1/rows.csv": ("rows", "./x=1/rows.csv"),
        "größer.1-a_b=x=y.csv": ("größer.1-a_b", "x=y.csv"),
    }
    assert {text: named_file(text) for text in names} == {text: (name, Path(p)) for text, (name, p) in names.items()}
