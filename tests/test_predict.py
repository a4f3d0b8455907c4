"""scripts/predict.py as it is used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def model(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a head: the tiny encoder's own random one, under its label names."""
    folder = tmp_path_factory.mktemp("predict") / "model"
    folder.mkdir()
    for file in tiny_encoder.iterdir():
        content = file.read_bytes()
        if file.name == "config.json":
            content = content.replace(b"XLMRobertaModel", b"XLMRobertaForSequenceClassification")
        (folder / file.name).write_bytes(content)
    return folder


def predict(*options: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "scripts/predict.py", "--device", "cpu", *map(str, options)]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, check=False)


def test_arguments_and_lines_give_the_same(model: Path) -> None:
    sentences = ["A fine film.", "Ein Café, größer als nötig", "word " * 200 + "end", "", '"Quoted']
    from_arguments = predict("--model", model, "--precision", "fp32", *sentences)
    assert (from_arguments.returncode, from_arguments.stderr) == (0, b"")
    lines = from_arguments.stdout.decode().splitlines()
    assert [line.split("\t")[2] for line in lines] == sentences
    for line in lines:
        label, probability, _ = line.split("\t")
        assert label in ("a", "b")
        assert 0.5 <= float(probability) <= 1
    stdin = "\r\n".join(sentences).encode()
    from_lines = predict("--model", model, "--precision", "fp32", "--batch-size", 2, stdin=b"\xef\xbb\xbf" + stdin)
    assert from_lines.stdout == from_arguments.stdout


def test_three_columns_whatever_the_sentence_holds(model: Path) -> None:
    done = predict("--model", model, "tab\there and\nline end")
    assert done.stdout.decode().rstrip("\n").split("\t")[2] == "tab here and line end"


def test_nothing_in_nothing_out(model: Path) -> None:
    assert predict("--model", model).stdout == b""


@pytest.mark.parametrize(
    ("options", "stdin", "says"),
    [
        (lambda _: ["x"], b"", "required: --model"),
        (lambda _: ["--model", "no/such", "x"], b"", "no/such: neither"),
        (lambda model: ["--model", model.parent, "x"], b"", "has no config.json"),
        (lambda model: ["--model", model, "--batch-size", "0", "x"], b"", "--batch-size must be"),
        (lambda model: ["--model", model, "--device", "cuda", "x"], b"", "no CUDA GPU"),
        (lambda model: ["--model", model], b"fine\ncaf\xe9\n", "standard input, line 2: not UTF-8"),
    ],
)
def test_wrong_use(model: Path, options: Callable[[Path], list[object]], stdin: bytes, says: str) -> None:
    done = predict(*options(model), stdin=stdin)
    assert done.returncode == 2
    assert done.stderr.decode().count("\n") == 1
    assert says in done.stderr.decode()


def test_an_encoder_without_head_is_refused(tiny_encoder: Path) -> None:
    done = predict("--model", tiny_encoder, "x")
    assert done.returncode == 2
    assert b"has no classification head" in done.stderr


def test_a_reader_that_stops_is_no_error(model: Path) -> None:
    command = f'seq 5000 | "{sys.executable}" scripts/predict.py --model "{model}" --device cpu | head -n 1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, cwd=ROOT, check=False)
    assert done.stderr == b""
    assert done.stdout.count(b"\n") == 1
