"""`sst2-xlmr study` and `sst2-xlmr split`."""

import json
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Capture, Patch, Words, metrics, refusal, user_error
from running import call_in_forks, forked, wait_for
from sklearn.linear_model import LogisticRegression

from sst2_xlmr.cli import parse_args
from sst2_xlmr.data.batches import select_rows
from sst2_xlmr.data.prepare import prepare
from sst2_xlmr.model.classifier import build_classifier
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.programs import split, study, study_runs
from sst2_xlmr.programs.study import PENALTY, linear_probe
from sst2_xlmr.programs.study_runs import digest
from sst2_xlmr.report.tables import Results, interval, summary
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.training.run_folder import lock_run_folder

run_study = partial(call_in_forks, study.main)


@pytest.fixture
def common(train_words: Words, tmp_path: Path) -> Words:
    return lambda *options: train_words(tmp_path / "all", *options)


def test_settings_and_seeds_are_run_once_and_summed_up(common: Words, tmp_path: Path, capfd: Capture) -> None:
    words = ["--seeds", "3,5", *common("--epochs", 1)]
    words += ["--setting", "plain", "--drop-leaks", "--setting", "fast", "--lr 5e-3 --label-smoothing 0.1"]
    run_study(*words)
    first = capfd.readouterr()
    runs = {(name, seed): tmp_path / "all" / name / f"seed-{seed}" for name in ("plain", "fast") for seed in (3, 5)}
    for (name, seed), run in runs.items():
        config = json.loads((run / "config.json").read_text())
        assert (config["seed"], config["lr"]) == (seed, 1e-3 if name == "plain" else 5e-3)
    found = json.loads((tmp_path / "all" / "study.json").read_text())
    last = {key: metrics(run)[-1]["accuracy"] for key, run in runs.items()}
    assert {(name, int(seed)): v["dev"] for name, by in found["runs"].items() for seed, v in by.items()} == last
    pairs = [last["fast", seed] - last["plain", seed] for seed in (3, 5)]
    difference = found["summary"]["fast"]["difference"]["dev"]
    assert difference["mean"] == pytest.approx(sum(pairs) / 2)
    assert difference["half_width"] == pytest.approx(12.706 * abs(pairs[0] - pairs[1]) / 2)
    assert f"fast - plain, dev: {sum(pairs) * 50:+.2f} points" in first.out
    assert found["summary"]["plain"]["difference"] == {}
    assert "\nlinear probe on the frozen encoder: dev 0." in first.out
    assert first.err == ""

    # As if one run had been stopped before its end, and the study killed while another trained, which then went on.
    (runs["fast", 5] / "model").rename(tmp_path / "away")
    runs["plain", 3].with_suffix(".seconds").unlink()
    run_study(*words)
    printed = capfd.readouterr().out
    assert printed.count("was finished") == 3
    assert "resume     from" in runs["fast", 5].with_suffix(".log").read_text()
    again = json.loads((tmp_path / "all" / "study.json").read_text())["runs"]
    assert again["fast"]["5"]["dev"] == last["fast", 5]
    assert again["plain"]["3"]["seconds"] is None
    assert again["plain"]["5"]["seconds"] == found["runs"]["plain"]["5"]["seconds"]
    assert next(line.split()[-1] for line in printed.splitlines() if line.startswith("plain  ")) == "-"
    assert "--lr 0.5 differs from 0.001" in refusal(run_study, *words, "--lr", "0.5")


def test_the_linear_probe_is_scikit_learns_logistic_regression(common: Words, tiny_encoder: Path) -> None:
    config, _ = parse_args(common("--eval-batch-tokens", 100))
    model, _ = build_classifier(find_encoder(str(tiny_encoder)), SingleLabel(["a", "b"]))
    inputs = prepare(config)
    features, labels = {}, {}
    for name, cache in inputs.caches.items():
        ids, lengths = select_rows(cache.ids, cache.starts, cache.lengths, np.arange(len(cache)))
        rows = [row[None] for row in ids.split(lengths.tolist())]
        with torch.no_grad():
            features[name] = torch.cat([model.encoder(row, None) for row in rows]).tanh().numpy()
        labels[name] = cache.labels
    mean, deviation = features["train"].mean(0), features["train"].std(0, ddof=1) + 1e-6
    # Softmax's two weights of a feature are half of logistic regression's, with opposite signs.
    reference = LogisticRegression(C=2 / (PENALTY * len(labels["train"])), tol=1e-8)
    reference.fit((features["train"] - mean) / deviation, labels["train"])
    assert linear_probe(config) == reference.score((features["dev"] - mean) / deviation, labels["dev"])


def test_the_interval_is_students_and_leaves_out_what_is_unknown() -> None:
    """The paired differences 1, 2, ..., 5: mean 3, deviation 1.581, t(4) 2.776."""
    half = pytest.approx(2.776 * 1.5811 / 5**0.5, rel=1e-3)
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == {"mean": 3.0, "half_width": half}
    runs: dict[str, Results] = {
        "a": {seed: {"dev": 0.5, "seconds": float(seed) if seed > 1 else None} for seed in (1, 2, 3)},
        "b": {seed: {"dev": 0.6, "seconds": 2.0 * seed} for seed in (1, 2, 3)},
        "c": {seed: {"seconds": None} for seed in (1, 2, 3)},
    }
    found = summary(runs)
    assert found["b"]["difference"]["seconds"]["mean"] == 2.5
    assert found["c"]["difference"] == {}
    assert found["c"]["mean"] == {"dev": None, "seconds": None}


def test_figures_are_the_last_of_every_file_and_the_best_of_dev(tmp_path: Path, monkeypatch: Patch) -> None:
    for name in ("check_inputs", "parse_args"):
        monkeypatch.setattr(study_runs, name, lambda *_: None)
    (tmp_path / "seed-1" / "model").mkdir(parents=True)
    (tmp_path / "seed-1" / "config.json").touch()
    values = [("dev", 0.5), ("dev", 0.7), ("dev", 0.6), ("de", 0.9), ("best/de", 1.0)]
    lines = [json.dumps({"step": 1, "split": split, "accuracy": value}) for split, value in values]
    (tmp_path / "seed-1" / "metrics.jsonl").write_text("\n".join(lines))
    assert study_runs.train([], tmp_path, 1) == (False, {"dev": 0.6, "best dev": 0.7, "de": 0.9, "seconds": None})


def test_a_failing_run_ends_it_with_its_status(common: Words, small_data: Path, tmp_path: Path, capfd: Capture) -> None:
    (small_data / "train.tsv").write_text("sentence\tlabel\nno label\tx\nyes\t0\n")
    with pytest.raises(SystemExit, match="^2$"):
        run_study("--seeds", "1,2", *common(), "--label-names", "a,b")
    printed = capfd.readouterr()
    assert "error: " in printed.err and "label 'x' is neither one of a, b" in printed.err
    assert not (tmp_path / "all" / "ours" / "seed-2").exists()


def test_a_run_is_no_run_on_other_files(common: Words, small_data: Path, tmp_path: Path, capsys: Capture) -> None:
    """The same files under another path are the same; a study older than the notes gets them."""
    options = ["--seeds", "1", *common("--max-steps", 1)]
    run_study(*options)
    notes = tmp_path / "all" / "ours" / "seed-1.inputs.json"
    before = notes.read_text()
    assert sorted(json.loads(before)) == ["dev", "the encoder's tokenizer", "the encoder's weights", "train"]
    moved = tmp_path / "moved"
    shutil.copytree(small_data, moved)
    notes.unlink()
    run_study(*options, "--data-dir", moved)
    assert "was finished" in capsys.readouterr().out
    assert notes.read_text() == before
    digest.cache_clear()  # as in another process
    shutil.copy(moved / "dev.tsv", tmp_path / "new.tsv")
    says = refusal(run_study, *options, "--test-file", tmp_path / "new.tsv")
    assert "/new.tsv (new) is not the file of the run " in says and "; give" in says
    with (moved / "dev.tsv").open("a") as file:
        file.write("one more\t0\n")
    says = refusal(run_study, *options, "--data-dir", moved)
    assert "moved/dev.tsv (dev) is not the file of the run " in says and "another --output-dir" in says
    notes.write_text(json.dumps({**json.loads(before), "fr": "0"}))
    says = refusal(run_study, *options)
    assert "nothing (fr) is not the file of the run " in says and "; give the same files" in says


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_stopped_ends_it(number: signal.Signals, common: Words, tmp_path: Path) -> None:
    options, folder = common("--epochs", 100_000), tmp_path / "all" / "ours"
    log, errors = folder / "seed-1.log", tmp_path / "errors"
    with forked(["scripts/study.py", "--seeds", "1,2", *options], tmp_path / "out", errors) as process:
        wait_for(log, "step ", process)
        # A terminal's Ctrl-C goes to both processes.
        os.killpg(process.pid or 0, number) if number == signal.SIGINT else process.send_signal(number)
        assert process.wait() == 128 + number
    # Training has ended before: the same command, given at once, does not find its folder in use.
    lock_run_folder(folder / "seed-1").close()
    assert f"by {number.name} after step" in errors.read_text()
    assert not (folder / "seed-2").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seeds", "1,x"], "'1,x' is not a list of different seeds"),
        (["--seeds", "1", "--seed=2"], "leave out --seed: every run has its own"),
        (["--seeds", "1", "--config", "x"], "leave out --config"),
        (["--seeds", "1", "--setting", "a", "@options"], "leave out --config"),
        (["--seeds", "1", "--setting", "a", "--lr 'x,y"], '--setting a: cannot split "--lr \'x,y" into words'),
        (["--seeds", "1", "--setting", "a/b", ""], "use letters, digits and hyphens"),
        (["--seeds", "1", "--setting", "a", "", "--setting", "a", "--lr 1"], "--setting a: that name is taken"),
        (["--seeds", "1", "--setting", "a", "--epoch 3"], "did you mean --epochs?"),
    ],
)
def test_misuse(options: list[str], says: str, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "options").write_text("--config x.json  # of another run\n")
    monkeypatch.chdir(tmp_path)
    assert says in user_error(study.main, ["--output-dir", "x", *options])
    assert not os.path.lexists("x")


def write_tsv(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(["sentence\tlabel\n", *(f"{text}\t{n % 2}\n" for n, text in enumerate(texts))]))
    return file


def run_split(source: Path, output: Path, *options: Any) -> tuple[list[str], list[str]]:
    split.main([str(word) for word in ["--train-file", source, "--output-dir", output, "--keep-parts-apart", *options]])
    train, test = ((output / f"{name}{source.suffix}").read_text().splitlines() for name in ("train", "test"))
    return train, test


def test_nothing_of_the_test_is_left_to_train_on(tmp_path: Path, capsys: Capture) -> None:
    """300 sentences of few words and 900 phrases cut from them; against a comparison of all with all."""
    draw = random.Random(0)
    sentences = [[f"w{draw.randrange(150)}" for _ in range(draw.randrange(4, 12))] for _ in range(300)]
    rows = [*sentences]
    for sentence in draw.choices(sentences, k=900):
        start = draw.randrange(len(sentence))
        rows.append(sentence[start : start + draw.randrange(1, 6)])
    texts = [" ".join(row).upper() if draw.random() < 0.5 else " ".join(row) for row in draw.sample(rows, len(rows))]
    source = write_tsv(tmp_path / "all.tsv", texts)
    train, test = run_split(source, tmp_path / "a", "--rows", 60)
    assert "60 test rows, 183 in no split" in capsys.readouterr().out
    assert len(test) == 61
    assert len(train) > 400
    assert {*train, *test} <= set(source.read_text().splitlines()), "rows stay as they are"
    held, left = ([f" {line.split(chr(9))[0].lower()} " for line in lines[1:]] for lines in (test, train))
    assert not [(a, b) for a in held for b in left if a in b or b in a]

    few, again = run_split(source, tmp_path / "b", "--rows", 60, "--train-rows", 100)
    assert len(few) == 101
    assert set(few) <= set(train)
    assert again == test


@pytest.mark.parametrize("different", [False, True])
def test_splitting_rows_that_are_alike_compares_few_of_them(different: bool) -> None:
    """20,000 rows of one text, or that begin alike: a comparison of all with all would take many minutes."""
    alike = [f"this film is the best of all {n if different else ''}" for n in range(20_000)]
    rows = [tuple(text.split()) for text in [*alike, *(f"text number {n} is another" for n in range(200))]]
    left, test = split.split_rows(rows, 100, seed=0)
    assert len(test) == 100
    assert not {rows[row] for row in left} & {rows[row] for row in test}


def test_shares_are_of_all_rows_and_of_each_class(tmp_path: Path) -> None:
    source, output = write_tsv(tmp_path / "t.tsv", [f"text {n}" for n in range(100)]), tmp_path / "out"
    words = ["--train-file", source, "--output-dir", output, "--test-share", 0.3, "--dev-share", 0.2]
    split.main(list(map(str, words)))
    parts = {file.stem: file.read_text().splitlines()[1:] for file in output.iterdir()}
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 50, "dev": 20, "test": 30}
    assert sorted(row for rows in parts.values() for row in rows) == sorted(source.read_text().splitlines()[1:])
    assert all(sum(row.endswith("1") for row in rows) * 2 == len(rows) for rows in parts.values())


def test_rows_without_header_are_split_by_class_too(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "t.tsv").write_text("".join(f"text {n}\t{'yes' if n < 10 else 'no'}\n" for n in range(100)))
    (tmp_path / "t.txt").write_text("".join(f"text {n}\n" for n in range(100)))
    for name in ("t.tsv", "t.txt"):
        split.main(
            ["--train-file", f"{tmp_path}/{name}", "--test-share", "0.5", "--output-dir", f"{tmp_path}/{name}.out"]
        )
    assert (tmp_path / "t.tsv.out/test.tsv").read_text().count("yes") == 5
    assert capsys.readouterr().out.count("no label column: the rows are drawn at random") == 1


def test_splitting_csv_keeps_columns_and_quotes(tmp_path: Path) -> None:
    rows = [f'"a film, number {n}, of many",{n % 2},"x\ny"' for n in range(30)]
    (tmp_path / "t.csv").write_text("review,stars,note\n" + "\n".join(rows) + "\n")
    _, test = run_split(tmp_path / "t.csv", tmp_path / "out", "--rows", 5, "--text-column", "review")
    assert test[0] == "review,stars,note"
    assert sum(row in "\n".join(test) for row in rows) == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rows", "4", "--test-share", "0.1"], "--rows and --test-share both define the test rows"),
        (["--rows", "40"], "--rows 40 is too many: there are 40 rows, and some must remain"),
        (["--rows", "5", "--seed", str(2**32)], "--seed 4294967296 is not a number from 0 to 4294967295"),
        (["--rows", "5", "--train-rows", "99"], "35 rows are left to train on"),
        (["--rows", "5", "--text-column", "review"], "no column 'review'"),
        (["--rows", "5", "--label-column", "9"], "there is no --label-column 9"),
        (["--rows", "5", "--label-column", "lable"], "no column 'lable' among sentence, label"),
        (["--rows", "5", "--output-dir", "."], "--output-dir . already exists"),
    ],
)
def test_wrong_use_of_split(tmp_path: Path, options: list[str], says: str) -> None:
    source = write_tsv(tmp_path / "t.tsv", [f"text number {n}" for n in range(40)])
    assert says in user_error(run_split, source, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [["--dev-share", "0.4", "--test-share", "0.5"], ["--rows", "2", "--dev-share", "0.9"]]
)
def test_a_file_too_small_to_split(tmp_path: Path, options: list[str]) -> None:
    source = write_tsv(tmp_path / "t.tsv", ["one", "two", "three"])
    words = ["--train-file", str(source), "--output-dir", str(tmp_path / "out"), *options]
    assert "has 3 rows, which leaves none for" in user_error(split.main, words)
    assert not (tmp_path / "out").exists()
