"""Repeated, contradictory and leaked rows: counted exactly, named by their lines, dropped on request."""

import csv
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import Capture, Patch, RunTrain, metrics, train_options, user_error

from sst2_xlmr import train
from sst2_xlmr.cli import parse_args
from sst2_xlmr.data.prepare import prepare
from sst2_xlmr.data.splits import stratified_sample
from sst2_xlmr.data.token_cache import find_duplicates, text_digests
from sst2_xlmr.report.inputs import data_report, input_lines

HINT = "--drop-duplicates drops them"


def test_counts_are_those_of_a_slow_comparison() -> None:
    draw = random.Random(0)
    rows = [(f"text {draw.randrange(300)}", draw.choice([None, "b", "c"]), draw.randrange(3)) for _ in range(1000)]
    texts, pairs, labels = zip(*rows)
    digests = text_digests(texts, pairs)
    duplicates, conflicts = find_duplicates(digests, np.array(labels))
    assert duplicates.tolist() == [number for number, row in enumerate(rows) if row in rows[:number]]
    labels_of: dict[tuple[str, str | None], set[int]] = {}
    for text, pair, label in rows:
        labels_of.setdefault((text, pair), set()).add(label)
    assert conflicts.tolist() == [number for number, row in enumerate(rows) if len(labels_of[row[:2]]) > 1]
    others = [f"text {number}" for number in range(0, 600, 3)]
    leaks = np.flatnonzero(np.isin(digests, text_digests(others, [None] * len(others))))
    assert leaks.tolist() == [number for number, row in enumerate(rows) if row[0] in others and row[1] is None]


def test_pairs_and_few_rows() -> None:
    digests = text_digests(["ab", "a", "abc", "abc", ""], ["c", "bc", "", None, "abc"])
    assert len(set(digests.tolist())) == 5, "the digest of a pair knows where its first text ends"
    for rows in range(3):
        duplicates, conflicts = find_duplicates(text_digests(["a"] * rows, [None] * rows), np.arange(rows))
        assert (len(duplicates), len(conflicts)) == (0, 0 if rows < 2 else 2)


@pytest.fixture
def dirty_data(small_data: Path) -> Path:
    """50 rows of which the first three come twice more, one with another label; two are dev's."""
    file = small_data / "train.tsv"
    lines = file.read_text(encoding="utf-8").splitlines()
    dev = (small_data / "dev.tsv").read_text(encoding="utf-8").splitlines()
    text, label = lines[4].split("\t")
    lines += [lines[1], lines[2], lines[3], f"{text}\t{1 - int(label)}", dev[1], dev[7]]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return small_data


def test_the_header_says_what_was_found(
    run_train: RunTrain, small_data: Path, tmp_path: Path, capsys: Capture, request: pytest.FixtureRequest
) -> None:
    run_train(tmp_path / "clean", "--max-steps", 1)
    said = capsys.readouterr().out
    assert not any(word in said for word in ("duplicates ", "conflicts ", "leaks "))
    request.getfixturevalue("dirty_data")
    run_train(tmp_path / "run", "--max-steps", 1)
    said = capsys.readouterr().out
    for line in (
        f"duplicates 3 training rows have the text and label of an earlier one, e.g. train.tsv:52; {HINT}\n",
        f"conflicts  2 training rows have a text with conflicting labels, e.g. train.tsv:5 and train.tsv:55; {HINT}\n",
        "leaks      2 training rows have a text of dev, e.g. train.tsv:56 and dev.tsv:2; --drop-leaks drops them\n",
        "rows       train 56, dev 20;",
    ):
        assert line in said


def test_the_report_names_lines_of_a_csv_that_is_gone(tiny_encoder: Path, dirty_data: Path, tmp_path: Path) -> None:
    """They are in the token cache; the last row spans two lines."""
    file = dirty_data / "train.csv"
    rows = [line.split("\t") for line in (dirty_data / "train.tsv").read_text(encoding="utf-8").splitlines()]
    with file.open("w", encoding="utf-8", newline="") as written:
        csv.writer(written).writerows([*rows[:1], ["two\nlines", "0"], *rows[1:], ["two\nlines", "0"]])
    words = train_options(tiny_encoder, dirty_data, tmp_path / "run")
    several = [*words, "--train-file", str(dirty_data / "dev.tsv"), str(dirty_data / "train.tsv")]
    files = prepare(parse_args(several)[0])
    (dirty_data / "train.tsv").unlink()
    inputs = prepare(parse_args(words)[0])
    file.unlink()
    assert inputs.place_of("train", 0) == "train.csv:2"
    assert inputs.place_of("train", 1) == "train.csv:4"
    assert files.place_of("train", 20) == "train.tsv:2", "the first row of the second file"
    assert "4 training rows have the text and label of an earlier one, e.g. train.csv:" in data_report(inputs)[0]


def test_rows_stay_dropped_on_resume(run_train: RunTrain, dirty_data: Path, tmp_path: Path, capsys: Capture) -> None:
    """The same rows without the bad ones give the same number of steps; another test file would have other leaks."""
    run = run_train(tmp_path / "run", "--epochs", 2, "--drop-duplicates", "--drop-leaks", "--save-every", 3)
    said = capsys.readouterr().out
    # 3 duplicates, 2 contradictory rows and 2 leaks: 49 rows, 7 batches of 8.
    assert "rows       train 49 of 56, dev 20" in said
    assert said.count("; dropped\n") == 3
    assert [line for line in metrics(run) if "split" not in line][-1]["step"] == 14
    resume = ["--resume", "--output-dir", str(run)]
    assert "--drop-leaks" in user_error(train.main, [*resume, "--no-drop-leaks"])
    other = tmp_path / "other.tsv"
    other.write_text("".join((dirty_data / "train.tsv").open(encoding="utf-8").readlines()[:9]), encoding="utf-8")
    assert "training rows: changed since the run" in user_error(train.main, [*resume, "--test-file", str(other)])


def test_nothing_left_is_an_error(tiny_encoder: Path, small_data: Path, tmp_path: Path) -> None:
    (small_data / "train.tsv").write_text((small_data / "dev.tsv").read_text())
    words = train_options(tiny_encoder, small_data, tmp_path / "run", "--drop-leaks")
    assert "leaves no row to train on" in user_error(train.main, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dev_that_is_cut_off(share: float) -> None:
    """By class, equal texts on one side, whatever the order of the rows."""
    draw = np.random.RandomState(0)
    labels = np.repeat([0, 1, 2], [600, 300, 10])
    digests = np.array([label * 10**6 + draw.randint(400) for label in labels], np.uint64)
    dev = stratified_sample(digests, labels, share, seed=3)
    assert not set(digests[dev].tolist()) & set(np.delete(digests, dev).tolist())
    for label, count in enumerate((600, 300, 10)):
        assert abs(int((labels[dev] == label).sum()) - share * count) <= 2
    order = draw.permutation(len(labels))
    again = stratified_sample(digests[order], labels[order], share, seed=3)
    assert sorted(digests[order][again].tolist()) == sorted(digests[dev].tolist())
    assert stratified_sample(digests, labels, share, seed=4).tolist() != dev.tolist()


def test_rows_are_counted_by_file_where_a_split_has_all_of_them(
    tiny_encoder: Path, small_data: Path, tmp_path: Path
) -> None:
    files = [str(small_data / "train.tsv"), str(small_data / "dev.tsv")]
    words = train_options(tiny_encoder, small_data, tmp_path / "run", "--train-file", *files, "--dev-share", 0.2)
    lines = [line for line in input_lines(prepare(parse_args(words)[0])) if line.startswith("files")]
    assert lines == ["files      train: train.tsv 50, dev.tsv 20"]


def test_dev_is_cut_off_where_there_is_none_or_a_share_is_given(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    words = train_options(tiny_encoder, small_data, tmp_path / "run")
    more = prepare(parse_args([*words, "--dev-share", "0.3"])[0])
    assert len(more.caches["dev"]) == 15
    assert "dev.tsv is not used: --dev-share" in more.splits["train"].notes[0]
    files = ["--train-file", str(small_data / "train.tsv"), "--test-file", str(small_data / "dev.tsv")]
    splits = prepare(parse_args([*files, "--max-length", "64", "--encoder", str(tiny_encoder)])[0]).splits
    assert [splits[name].files[0].name for name in splits] == ["train.tsv", "train.tsv", "dev.tsv"], "a test, not dev"
    (small_data / "dev.tsv").unlink()
    inputs = prepare(parse_args(words)[0])
    rows, rest = (inputs.splits[split].source_rows for split in ("dev", "train"))
    assert rows is not None and rest is not None
    assert sorted([*rows.tolist(), *rest.tolist()]) == list(range(50))
    lines = (small_data / "train.tsv").read_text(encoding="utf-8").splitlines()
    places = [int(inputs.place_of("dev", row).split(":")[1]) for row in range(5)]
    texts = inputs.splits["dev"].texts_at(inputs.task, {*range(5)})
    assert list(texts.values()) == [lines[at - 1].split("\t")[0] for at in places]
    assert len(rows) == 5 and not inputs.leaks
    assert prepare(parse_args(words)[0]).digests() == inputs.digests() != more.digests()
    monkeypatch.setattr("sst2_xlmr.data.prepare.MAX_DEV_ROWS", 2)
    assert len(prepare(parse_args(words)[0]).caches["dev"]) == 2, "of a large file no more"
