"""scripts/evaluate.py as it is used."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SAMPLE_DATA, metrics, train_options, user_error
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sst2_xlmr import train
from sst2_xlmr.config import named_file

DE, RU = SAMPLE_DATA / "test.de.tsv", SAMPLE_DATA / "test.ru.tsv"


@pytest.fixture(scope="module")
def run(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a little data, which was evaluated on two files."""
    folder = tmp_path_factory.mktemp("evaluate")
    files = ["--eval-file", f"de={DE}", f"ru={RU}"]
    train.main(train_options(tiny_encoder, SAMPLE_DATA, folder / "run", "--max-steps", 60, "--lr", 3e-3, *files))
    return folder / "run"


def evaluate(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/evaluate.py", "--device", "cpu", "--precision", "fp32", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_numbers_are_those_of_training(run: Path, tmp_path: Path) -> None:
    file, events = tmp_path / "numbers.json", tmp_path / "events"
    outputs = ["--json", file, "--tensorboard", events]
    done = evaluate("--model", run / "model", "--file", f"de={DE}", "--file", f"ru={RU}", RU, *outputs)
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["labels"] == ["negative", "positive"]
    assert list(content["files"]) == ["de", "ru", "test.ru"]
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
    assert content["mean"]["accuracy"] == pytest.approx(sum(accuracies) / 3)

    table = [line.split() for line in done.stdout.split("\n\n")[0].splitlines()]
    assert [line[0] for line in table] == ["file", "de", "ru", "test.ru", "mean"]
    assert [line[1] for line in table[1:4]] == [f"{accuracy:.4f}" for accuracy in accuracies]
    of_de = [line.split() for line in done.stdout.split("\n\n")[1].splitlines()]
    assert [line[0] for line in of_de] == ["de", "negative", "positive"]
    assert [[int(count) for count in line[5:]] for line in of_de[1:]] == content["files"]["de"]["confusion"]

    tags = EventAccumulator(str(events)).Reload().Tags()
    assert {"de/accuracy", "ru/ece", "test.ru/loss"} <= set(tags["scalars"])
    assert {"de/confusion", "accuracy by file"} <= set(tags["images"])
    assert {"de/pr_positive", "de/mistakes/text_summary"} <= set(tags["tensors"])


def test_a_precision_is_compared_with_another(run: Path) -> None:
    options = ["--model", run / "model", "--file", f"de={DE}", f"ru={RU}", "--precision", "int8", "--against", "fp32"]
    done = evaluate(*options, "--most-changed", 100, "--most-lost", 100)
    if "cannot compute it" in done.stderr:
        pytest.skip("no AVX512-VNNI")
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.split("\n\n")[-1].splitlines()]
    assert [line[0] for line in table] == ["file", "de", "ru", "all"]
    assert [line[-1] for line in table[1:]] == ["40", "40", "80"]
    same = evaluate(*options[:-4], "--precision", "fp32", "--against", "fp32")
    assert "--against fp32 compares fp32 with itself" in same.stderr
    alone = evaluate(*options[:-4], "--most-changed", 5)
    assert "--most-changed and --most-lost need --against" in alone.stderr


def test_a_precision_that_changes_too_much_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All labels turned around, since the model may give all rows the same one."""
    main = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["main"]
    answers_of = main.__globals__["answers_of"]

    def turned_around(*given: Any) -> Any:
        answers = answers_of(*given)
        return answers._replace(found=1 - answers.found)

    monkeypatch.setitem(main.__globals__, "answers_of", turned_around)
    options = ["--model", run / "model", "--file", f"de={DE}", f"ru={RU}", "--device", "cpu"]
    options += ["--precision", "bf16", "--against", "fp32"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, options)])
    line = user_error(main, capsys)
    assert "bf16 changes 80 of 80 labels of fp32, 100.00%, and at most 1.00% are allowed; take fp32" in line


def test_columns_and_formats(run: Path, tmp_path: Path) -> None:
    rows = [line.split("\t") for line in DE.read_text(encoding="utf-8").splitlines()[1:]]
    names = ["negative", "positive"]
    file = tmp_path / "reviews.jsonl"
    lines = [json.dumps({"review": text, "kind": names[int(label)]}, ensure_ascii=False) for text, label in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    columns = ["--text-column", "review", "--label-column", "kind", "--batch-tokens", 7]
    ours = evaluate("--model", run / "model", "--file", file, *columns).stdout
    theirs = evaluate("--model", run / "model", "--file", f"reviews={DE}").stdout
    assert ours == theirs != ""
    assert "mean" not in ours, "one file has none"


def test_many_classes_have_no_matrix(tiny_encoder: Path, tmp_path: Path) -> None:
    data, names = tmp_path / "data", [f"class{n}" for n in range(12)]
    data.mkdir()
    for split in ("train", "dev"):
        (data / f"{split}.csv").write_text(
            "sentence,label\n" + "".join(f"text {name},{name}\n" for name in names * 2), encoding="utf-8"
        )
    options = ["--epochs", 1, "--label-names", ",".join(names)]
    train.main(train_options(tiny_encoder, data, tmp_path / "run", *options))
    done = evaluate("--model", tmp_path / "run" / "model", "--file", data / "dev.csv", "--tensorboard", tmp_path / "tb")
    assert done.returncode == 0, done.stderr
    assert "taken for" not in done.stdout
    assert done.stdout.count("\nclass") == 12
    curves = [tag for tag in EventAccumulator(str(tmp_path / "tb")).Reload().Tags()["tensors"] if "/pr_" in tag]
    assert sorted(curves) == sorted(f"dev/pr_class{n}" for n in range(10))


def test_a_reader_that_stops_is_no_error(run: Path, tmp_path: Path) -> None:
    command = f'"{sys.executable}" scripts/evaluate.py --model "{run}/model" --file "{DE}" --json "{tmp_path}/x" | true'
    done = subprocess.run(["bash", "-c", command], capture_output=True, cwd=ROOT, check=False)
    assert done.stderr == b""
    assert (tmp_path / "x").is_file()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (lambda run, tmp: ["--file", DE], "required: --model"),
        (lambda run, tmp: ["--model", run / "model"], "give either --file"),
        (lambda run, tmp: ["--model", "no/such", "--file", DE], "no/such: neither"),
        (lambda run, tmp: ["--model", run / "model", "--file", "no.tsv"], "--file no.tsv is not a file"),
        (lambda run, tmp: ["--model", run / "model", "--file", "de=no.tsv"], "--file no.tsv is not a file"),
        (lambda run, tmp: ["--model", run / "model", "--file", DE, DE], "two files have the name test.de"),
        (lambda run, tmp: ["--model", run / "model", "--file", f"x={DE}", f"x={RU}"], "two files have the name x"),
        (
            lambda run, tmp: ["--model", run / "model", "--file", DE, "--batch-tokens", "0"],
            "'0' is not a number from 1",
        ),
        (lambda run, tmp: ["--model", run / "model", "--file", DE, "--batch-tokens", "x"], "--batch-tokens"),
        (lambda run, tmp: ["--model", run / "model", "--file", DE, "--device", "cuda"], "no CUDA GPU"),
        (lambda run, tmp: ["--model", run / "model", "--file", DE, "--text-column", "t"], "no column 't'"),
        (lambda run, tmp: ["--model", run / "model", "--file", DE, "--label-column", "l"], "no column 'l'"),
        (lambda run, tmp: ["--model", run / "model", "--file", DE, "--json", tmp / "no" / "x"], "cannot write --json"),
        (lambda run, tmp: ["--model", run / "model", "--file", DE, "--json", tmp], "cannot write --json"),
        (
            lambda run, tmp: ["--model", run / "model", "--file", DE, "--tensorboard", run / "tensorboard"],
            "has events of another run",
        ),
        (
            lambda run, tmp: ["--model", run / "model", "--file", DE, "--tensorboard", DE],
            "cannot write to",
        ),
    ],
)
def test_wrong_use(
    run: Path,
    tmp_path: Path,
    options: Callable[[Path, Path], list[object]],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, options(run, tmp_path))])
    assert says in user_error(script["main"], capsys)


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("de=a/b.tsv", "de", "a/b.tsv"),
        ("a/test.de.tsv", "test.de", "a/test.de.tsv"),
        ("rows.jsonl.gz", "rows", "rows.jsonl.gz"),
        ("./x=1/rows.csv", "rows", "./x=1/rows.csv"),
        ("größer.1-a_b=x=y.csv", "größer.1-a_b", "x=y.csv"),
    ],
)
def test_names_of_files(text: str, name: str, path: str) -> None:
    assert named_file(text) == (name, Path(path))
