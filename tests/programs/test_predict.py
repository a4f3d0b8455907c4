"""scripts/predict.py as it is used."""

import csv
import fcntl
import gzip
import io
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Capture, Patch, change_json, change_weights, make_tokenizer, user_error
from running import Fork, forked_ranks, kill_group, run_ranks

import sst2_xlmr
from sst2_xlmr.data.formats import kind_of
from sst2_xlmr.data.rows import ReadOptions, read_rows
from sst2_xlmr.programs import predict as script
from sst2_xlmr.util.shards import shards_of

PROGRAM = "scripts/predict.py"


def words_for(model: Path, *options: object) -> list[str]:
    return ["--model", str(model), "--device", "cpu", "--precision", "fp32", *map(str, options)]


def run(model: Path, *options: object) -> None:
    script.main(words_for(model, *options))


def test_arguments_lines_and_files_give_the_same(model: Path, tmp_path: Path, capsys: Capture) -> None:
    texts = ["A fine film.", "Ein Café, größer als nötig", "word " * 200 + "end", "", '"Quoted']
    run(model, *texts)
    from_arguments = capsys.readouterr()
    rows = [line.split("\t") for line in from_arguments.out.splitlines()]
    assert [row[2] for row in rows] == texts
    assert all(label in ("a", "b") and 0.5 <= float(probability) <= 1 for label, probability, _ in rows)
    stdin = b"\xef\xbb\xbf" + "\r\n".join(texts).encode()
    command = [sys.executable, PROGRAM, *words_for(model, "--batch-tokens", 40)]
    done = subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, check=True)
    assert (done.stdout.decode(), done.stderr) == (from_arguments.out, b"")
    run(model, "--output", tmp_path / "out.jsonl", *texts)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [[row["label"], f"{row['probability']:.4f}", row["sentence"]] for row in found] == rows
    run(model, "--input", tmp_path / "out.jsonl", "--text-column", "sentence")
    assert capsys.readouterr().out == from_arguments.out


def test_nothing_in_nothing_out(model: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """A closed input is something else."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    run(model)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stdin", None)
    assert "no sentences: give them as arguments" in user_error(run, model)


ROWS = [
    {"id": "7", "text": 'a "fine" film, really', "note": "x"},
    {"id": "8", "text": "", "note": "empty"},
    {"id": "9", "text": "\u202eright to left \U0001f600", "note": ""},
]
INPUTS = {
    ".tsv": "".join("\t".join(row) + "\n" for row in [ROWS[0], *(row.values() for row in ROWS)]),
    ".csv": 'id,text,note\n7,"a ""fine"" film, really",x\n8,,empty\n9,\u202eright to left \U0001f600,\n',
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
}


def write_input(path: Path) -> Path:
    content = INPUTS[kind_of(path)].encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read_output(path: Path) -> list[dict[str, Any]]:
    return [dict(zip(row.source.names, row.source.cells)) for row in read_rows(path, ReadOptions("text"), None)]


@pytest.mark.parametrize("names", ["in.tsv out.jsonl", "in.csv.gz out.tsv.gz", "in.jsonl out.csv"])
def test_every_format_in_and_out(model: Path, tmp_path: Path, names: str, capsys: Capture) -> None:
    given, wanted = names.split()
    run(model, "--input", write_input(tmp_path / given), "--output", tmp_path / wanted, "--all-probabilities")
    found = read_output(tmp_path / wanted)
    assert list(found[0]) == ["id", "text", "note", "label", "probability", "probability_a", "probability_b"]
    assert [{**row, **expected} for row, expected in zip(found, ROWS)] == found and len(found) == len(ROWS)
    for row in found:
        probabilities = {name: float(row[f"probability_{name}"]) for name in ("a", "b")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=2e-6)
        assert probabilities[row["label"]] == float(row["probability"]) == max(probabilities.values())
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("quoting=3") == printed.err.count("\n") == (wanted == "out.tsv.gz"), "how pandas reads it"
    (tmp_path / "bare.csv").write_text("7,a film\n8,a play\n")
    run(model, "--input", tmp_path / "bare.csv", "--output", tmp_path / "bare.out.csv", "--text-column", 2)
    assert (tmp_path / "bare.out.csv").read_text().startswith("7,a film,"), "without names in, none out"


def test_jsonl_rows_with_other_keys(model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "x", "n": 1}, {"n": None, "text": "y"}, {"text": "z", "label": [1]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(model, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    found = read_output(tmp_path / "out.jsonl")
    added = ["label", "probability"]
    names = [["text", "n", *added], ["n", "text", *added], ["text", "label", "predicted_label", "probability"]]
    assert [list(row) for row in found] == names
    assert [{**row, **kept} for row, kept in zip(found, rows)] == found
    options = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.csv"]
    assert "line 3 of the input has other keys" in user_error(run, model, *options)
    assert not (tmp_path / "out.csv").exists()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    run(model, *options)
    assert [(row["text"], row["n"]) for row in read_output(tmp_path / "out.csv")] == [("x", "1"), ("y", "")]


def test_glue_submission(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """As many rows as test.tsv, numbers by the names of the classes; the server takes nothing else."""
    test, texts = tmp_path / "test.tsv", ["a fine film", "a poor one", "so-so"]
    test.write_text("".join(["index\tsentence\n", *(f"{n}\t{text}\n" for n, text in enumerate(texts))]))
    for names in (["negative", "positive"], ["positive", "negative"]):
        folder = Path(shutil.copytree(model, tmp_path / names[0]))
        change_json(folder / "config.json", id2label={str(number): name for number, name in enumerate(names)})
        run(folder, "--input", test, "--glue-submission", tmp_path / f"{names[0]}.glue")
        labels = sst2_xlmr.load(folder, "fp32", "cpu").predict(texts)
        lines = [f"{number}\t{int(label == 'positive')}\n" for number, label in enumerate(labels)]
        assert (tmp_path / f"{names[0]}.glue/SST-2.tsv").read_text() == "".join(["index\tprediction\n", *lines])
    test.write_text(test.read_text().replace("0\ta fine", "7\ta fine"))
    run(folder, "--input", test, "--glue-submission", tmp_path / "own")
    assert (tmp_path / "own/SST-2.tsv").read_text().splitlines()[1].startswith("7\t"), "numbers of the file's own"
    run(folder, "--input", write_many(tmp_path / "in.csv", 1500), "--glue-submission", tmp_path / "many")
    assert (tmp_path / "many/SST-2.tsv").read_text().splitlines()[1500].startswith("1499\t"), "counted"
    assert capsys.readouterr().out == ""
    options = ["--input", test, "--glue-submission", tmp_path / "other"]
    assert "the model's classes are a, b" in user_error(run, model, *options)
    assert list((tmp_path / "other").iterdir()) == []


def test_a_progress_bar_on_a_terminal_only(model: Path, tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))  # rows, columns
    words = words_for(model, "--input", write_input(tmp_path / "in.tsv"), "--output", tmp_path / "out.tsv")
    assert Fork([PROGRAM, *words], tmp_path / "log", errors=Path(os.ttyname(end))).wait() == 0
    os.close(end)
    assert (tmp_path / "log").read_text() == ""
    assert b"| 3/3 [00:" in os.read(terminal, 10_000)
    os.close(terminal)


def test_output_that_exists_is_kept_unless_told_otherwise(model: Path, tmp_path: Path) -> None:
    """So is what a link leads to, and a folder in any case."""
    out, other = tmp_path / "out.tsv", tmp_path / "out.tsv.part-0"
    other.write_text("precious")
    options = ["--output", out, "A fine film."]
    for name in ("file", "link"):
        out.symlink_to(other) if name == "link" else out.write_text("precious")
        assert "out.tsv already exists; choose another name" in user_error(run, model, *options)
        assert out.read_text() == "precious"
        run(model, *options, "--overwrite")
        assert len(list(read_rows(out, ReadOptions(), None))) == 1
        out.unlink()
    assert other.read_text() == "precious"
    out.mkdir()
    assert "out.tsv already exists" in user_error(run, model, *options, "--overwrite")


def write_many(path: Path, rows: int) -> Path:
    """Write rows of different length, some of them in quotes, more than two lines long."""
    texts = [[n, f'a "film"\nnumber {n} ' + "good " * (n % 7)] for n in range(rows)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["n", "text"], *texts])
    return path


def test_killed_and_resumed_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    """Killed twice while it writes, by two processes, then one, then two: the file of one undisturbed process."""
    given, (whole, out) = write_many(tmp_path / "in.csv", 12_000), (tmp_path / f"{name}.csv.gz" for name in "ab")
    run(model, "--input", given, "--output", whole)
    words = words_for(model, "--input", given, "--output", out, "--resume")

    def blocks() -> int:
        return len(list(shards_of(out).glob("0*.json")))

    for processes in (2, 1):
        before = blocks()
        with forked_ranks(processes, [PROGRAM, *words], tmp_path / "log") as forks:
            while blocks() < before + 2:
                assert forks[0].poll() is None
            for fork in forks:
                kill_group(fork)
        assert not out.exists()
    for said in ("", "b.csv.gz is already complete, so nothing was done; if it came from another"):
        statuses, _, errors = run_ranks(2, words, tmp_path, program=PROGRAM)
        assert statuses == [0, 0] and said in errors
    assert out.read_bytes() == whole.read_bytes()
    assert not shards_of(out).exists()


def test_more_processes_than_rows_at_once(model: Path, tmp_path: Path) -> None:
    """That a model is not for GLUE is said once."""
    words = words_for(model, "--input", write_many(tmp_path / "in.csv", 10))
    out = tmp_path / "out" / "out.csv"
    out.parent.mkdir()
    statuses, _, errors = run_ranks(3, [*words, "--output", str(out)], tmp_path, program=PROGRAM)
    assert statuses == [0, 0, 0], errors
    assert len(read_output(out)) == 10
    assert list(out.parent.iterdir()) == [out]
    statuses, _, errors = run_ranks(2, [*words, "--glue-submission", str(tmp_path)], tmp_path, program=PROGRAM)
    assert 2 in statuses
    assert errors.count("error: ") == errors.count("error: --glue-submission: the model's classes are a, b") == 1


def run_with(patched: Callable[[Iterator[Any]], Iterable[Any]], model: Path, *options: object) -> None:
    """Predict, where blocks of answers go through a function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "with_progress", lambda answers, *_, **__: patched(answers))
        run(model, *options)


def run_killed(model: Path, *options: object) -> None:
    """Predict, and die after a block."""

    def dies(answers: Iterator[Any]) -> Iterator[Any]:
        yield next(answers)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_with(dies, model, *options)


def test_what_was_to_replace_a_file_is_continued(model: Path, tmp_path: Path) -> None:
    """The file that exists is not taken for the result."""
    options = ["--input", write_many(tmp_path / "in.csv", 1500), "--output", tmp_path / "out.csv"]
    (tmp_path / "out.csv").write_text("of before")
    run_killed(model, *options, "--overwrite")
    assert "out.csv already exists" in user_error(run, model, *options, "--resume")
    run(model, *options, "--resume", "--overwrite")
    assert len(read_output(tmp_path / "out.csv")) == 1500


def change(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))


@pytest.mark.parametrize("what", ["--all-probabilities", "--precision bf16", "row", "weight", "classes", "pieces"])
def test_other_rows_are_not_continued(model: Path, tmp_path: Path, what: str) -> None:
    source, model = model, Path(shutil.copytree(model, tmp_path / "model"))
    options = ["--input", write_many(tmp_path / "in.csv", 1500), "--output", tmp_path / "out.csv"]
    run_killed(model, *options)
    assert (tmp_path / ".out.csv.shards" / "00000000.json").is_file()
    if what == "row":
        change(tmp_path / "in.csv", b"number 1499 ", b"number 1498 ")
    elif what == "weight":
        shutil.rmtree(model)
        change_weights(source, model, lambda found: found["classifier.out_proj.bias"].add_(1e-3))
    elif what == "classes":
        change(model / "config.json", b'"a"', b'"c"')
    elif what == "pieces":
        change(model / "sentencepiece.bpe.model", b"film", b"mlif")
    options += what.split() if what.startswith("--") else []
    assert "belong to another model, input" in user_error(run, model, *options, "--resume")
    assert "rows of an earlier run for" in user_error(run, model, *options)
    run(model, *options, "--overwrite")
    assert len(read_output(tmp_path / "out.csv")) == 1500
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.csv", "model", "out.csv"]


def test_a_file_that_came_meanwhile_is_not_replaced(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    options = ["--input", write_many(tmp_path / "in.csv", 20), "--output", output]
    says = user_error(run_with, lambda all: [*all, output.write_text("theirs")][:1], model, *options)
    assert "out.csv already exists" in says
    assert output.read_text() == "theirs"
    output.unlink()
    run(model, *options, "--resume")
    assert len(read_output(output)) == 20


def test_an_input_that_changes_meanwhile_is_no_result(model: Path, tmp_path: Path) -> None:
    """A row that is added after the file was read through would be missing."""
    file = write_many(tmp_path / "in.csv", 100)

    def add_row(blocks: Iterator[Any]) -> Iterator[Any]:
        for block in blocks:
            with file.open("a") as opened:
                opened.write("100,one more\n")
            yield block

    options = ["--input", file, "--output", tmp_path / "out.csv"]
    assert "in.csv changed while it was being read" in user_error(run_with, add_row, model, *options)
    assert not (tmp_path / "out.csv").exists()
    run(model, *options, "--overwrite")
    assert len(read_output(tmp_path / "out.csv")) == 101


def test_lines_tell_time_left(model: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(script, "SECONDS_BETWEEN_LINES", 0.0)
    run(model, "--input", write_many(tmp_path / "in.csv", 1500), "--output", tmp_path / "out.csv")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("1,024 of 1,500 rows, ")
    assert "rows/s, 00:00 left" in lines[1]


WRONG_USE = {
    "--input no.tsv": "cannot read no.tsv: No such file",
    "--input sample_data": "is a folder, but not one with a folder of texts per class",
    "--input sample_data/dev.tsv --output no/such/x.tsv": "cannot write no/such/x.tsv: No such file",
    "--input sample_data/dev.tsv --glue-submission g --all-probabilities": "--glue-submission holds labels only",
    "--input rows.tsv --glue-submission g --output g/../g/SST-2.tsv": "--glue-submission are the same file",
    "--input sample_data/dev.tsv --quoting foo": "--quoting must be one of none, double",
    "--input sample_data/dev.tsv --encoding rot13": "--encoding must be a text encoding",
    "--input sample_data/dev.tsv --format bar": "--format must be one of tsv, csv",
    "--text-column 2 x": "--text-column needs --input",
    "--glue-submission x x": "--glue-submission needs --input",
    "--resume x": "--resume needs --input and --output",
    "\udce9": "sentence 1: contains a NUL character or a lone surrogate (not UTF-8); remove it",
    "--model MODEL/no-such x": "no-such",
    "--model xlmr.base x": "xlmr.base has no classification head",
    "": "standard input, line 2: contains a NUL",
}


@pytest.mark.parametrize("options", WRONG_USE)
def test_wrong_use(model: Path, options: str, monkeypatch: Patch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"fine\ncaf\xe9\n")))
    assert WRONG_USE[options] in user_error(run, model, *options.replace("MODEL", str(model)).split())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "in.tsv",
            b"text\n" + b"fine\n" * 3000 + b"caf\xe9\n",
            "in.tsv, line 3002: 1 row cannot be used: 1 with truncated",
        ),
        ("in.csv", b"text,a,a\nx,1,2\n", "two columns are named 'a', which JSON cannot express"),
        ("in.jsonl", b'{"text": "\\ud83d"}\n', "1 with truncated or invalid characters (line 1)"),
        ("in.csv.gz", gzip.compress(b"text\nx\n", mtime=0)[:-3], "not a complete gzip file"),
    ],
)
def test_wrong_input(model: Path, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    """A bad row leaves no half output."""
    (tmp_path / name).write_bytes(content)
    assert says in user_error(run, model, "--input", tmp_path / name, "--output", tmp_path / "out.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_model_that_does_not_fit_is_refused(model: Path, tmp_path: Path) -> None:
    """Its tokenizer, of another model; single texts, for one of pairs."""
    other, pairs = (Path(shutil.copytree(model, tmp_path / name)) for name in ("other", "pairs"))
    rows = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    assert make_tokenizer(other / "sentencepiece.bpe.model", 2 * rows) > rows
    assert f" has {rows} embedding rows; they do not belong" in user_error(run, other, "x")
    change_json(pairs / "config.json", text_pairs=True)
    fix = "was trained on pairs of texts; name the second column, too, with --input FILE --text-pair-column NAME"
    assert fix in user_error(run, pairs, "a film")


def test_a_path_without_permission_is_named(monkeypatch: Patch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/secret/model")

    monkeypatch.setattr(script.Classifier, "load", refuse)
    assert "no permission for /secret/model" in user_error(script.main, ["--model", "/secret/model", "x"])


@pytest.mark.parametrize("is_full", [False, True])
def test_a_reader_that_stops_is_no_error_and_a_full_disk_is_one_line(model: Path, is_full: bool) -> None:
    program = f'seq 5000 | "{sys.executable}" scripts/predict.py --model "{model}" --device cpu'
    command = f"{program} {'> /dev/full' if is_full else '| head -n 1'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, cwd=ROOT, check=False)
    full = b"error: cannot write the output: No space left on device; free some space\n"
    assert (done.returncode, done.stderr) == ((2, full) if is_full else (0, b""))
    assert done.stdout.count(b"\n") == (0 if is_full else 1)


def test_a_line_is_answered_as_soon_as_it_is_there(model: Path) -> None:
    """By whoever waits for it before writing the next one."""
    command = [sys.executable, PROGRAM, *words_for(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, bufsize=0) as process:
        assert process.stdin is not None and process.stdout is not None
        for text in (b"a fine film\n", b"a poor one\n"):
            process.stdin.write(text)
            assert process.stdout.readline().endswith(b"\t" + text)
        process.stdin.close()
        assert process.wait() == 0
