"""Rows: which columns hold them, what a label means, and what is said of bad ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLE_DATA, SST2, SST2_NAMES, find_label_names, refusal

from sst2_xlmr.data.rows import has_labels, inspect, read_rows
from sst2_xlmr.data.sniff import ReadOptions
from sst2_xlmr.labels import find_label_names as names_of
from sst2_xlmr.labels import label_notes, resolve_label_names
from sst2_xlmr.task import SingleLabel


def rows(path: Path, content: bytes, names: list[str] = SST2_NAMES, options: ReadOptions = ReadOptions()) -> list[Any]:  # noqa: B008
    path.write_bytes(content)
    return [row[:3] for row in read_rows(path, options, SingleLabel(names))]


def labels_file(folder: Path, labels: list[object]) -> Path:
    if all(isinstance(label, str) for label in labels):
        (folder / "a.tsv").write_text("".join(["text\tlabel\n", *(f"x\t{label}\n" for label in labels)]))
        return folder / "a.tsv"
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in labels))
    return folder / "a.jsonl"


EXPECTED = [("a fine film", None, 1), ("a poor one", None, 0)]


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("glue.tsv", b"sentence\tlabel\na fine film\t1\na poor one\t0\n", ReadOptions()),
        ("hugging_face.csv", b"idx,text,label\n0,a fine film,1\n1,a poor one,0\n", ReadOptions()),
        ("both.csv", b"text,sentence,label\nx,a fine film,1\ny,a poor one,0\n", ReadOptions()),
        ("order.tsv", b"id\tlabel\tsentence\n7\t1\ta fine film\n8\t0\ta poor one\n", ReadOptions()),
        ("names.tsv", b"sentence\tlabel\na fine film\tpositive\na poor one\t negative \n", ReadOptions()),
        ("a.jsonl", b'{"text": "a fine film", "label": 1}\n{"label": "0", "text": "a poor one"}\n', ReadOptions()),
        ("named.csv", b"review,stars\na fine film,1\na poor one,0\n", ReadOptions("review", label="stars")),
        ("numbers.csv", b"review,stars\na fine film,1\na poor one,0\n", ReadOptions("1", label="2")),
        ("a_number_is_a_position.csv", b"label,1,2\n1,x,a fine film\n0,y,a poor one\n", ReadOptions("3")),
        ("capitals.csv", b"ID;Text;Label\n1;a fine film;1\n2;a poor one;0\n", ReadOptions()),
        ("twice.csv", b"text,label,text\nx,1,a fine film\ny,0,a poor one\n", ReadOptions("3")),
        ("headless.csv", b"a fine film,1\na poor one,0\n", ReadOptions("1", label="2", header=False)),
    ],
)
def test_columns(tmp_path: Path, name: str, content: bytes, options: ReadOptions) -> None:
    assert rows(tmp_path / name, content, options=options) == EXPECTED
    pairs = b"premise,hypothesis,label\nit rains,it is wet,0\n"
    for options in (ReadOptions("premise", "hypothesis"), ReadOptions("1", "2", "3")):
        assert rows(tmp_path / "pairs.csv", pairs, options=options) == [("it rains", "it is wet", 0)]


def test_names_that_look_like_numbers_are_names(tmp_path: Path) -> None:
    assert rows(tmp_path / "a.tsv", b"text\tlabel\nx\t1.0\n", ["0.0", "1.0"]) == [("x", None, 1)]
    assert rows(tmp_path / "a.tsv", b"text\tlabel\nx\t1\ny\t0\n", ["1", "0"]) == [("x", None, 0), ("y", None, 1)]
    content = b"text\tlabel\nx\t0\n"
    assert "label '0' is not one of 1, 2, 3" in refusal(rows, tmp_path / "a.tsv", content, ["1", "2", "3"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.tsv", b"sentence\tlabel\n", "has no rows"),
        ("a.tsv", b"review\tlabel\nx\t1\n", "line 2: no column 'sentence' or 'text' among review, label; name it with"),
        ("a.tsv", b"text\tstars\nx\t1\n", "no column 'label' among text, stars; name it with --label-column"),
        ("a.csv", b"v1,v2\nham,a b\nspam,c d\nham,e f\nham,g h\n", "(e.g. --text-column v2 --label-column v1)"),
        ("a.csv", b"text,a,b,c\nx y,0,1,0\nz w,1,1,0\n", "(e.g. --text-column text --label-columns a b c)"),
        ("a.csv", b"text,label,text\nx,1,y\n", "two columns are named 'text'; give --text-column a number"),
        ("a.tsv", b"text\tlabel\nx\t1\n \t0\n", "line 3: 1 of 2 rows cannot be used: 1 without text (line 3)"),
        ("a.tsv", b"text\tlabel\nx\t2\n", "line 2: label '2' is neither one of negative, positive nor a number from 0"),
        ("a.tsv", b"text\tlabel\nx\t-1\n", "1 without a label (line 2: '-1')"),
        ("a.tsv", "text\tlabel\nx\t\u0966\n".encode(), "line 2: label '\u0966'"),  # zero in Hindi
        ("a.tsv", b"text\tlabel\nx\tPositive\n", "label 'Positive' is neither one of negative, positive"),
        ("a.tsv", b"text\tlabel\nx\t1\ny\n", "1 with another number of columns (line 3: 1, not 2)"),
        ("a.tsv", b"text\tlabel\nx\t1\n\ny\t0\n\n", "1 with another number of columns (line 3: 1, not 2)"),
        ("a.tsv", b"text\tlabel\ncut caf\xc3\t1\n", "1 with truncated or invalid characters (line 2); fix them"),
        ("a.tsv", b"text\tlabel\ncaf\xe9 noir\t1\n", "line 2: not UTF-8; use --encoding cp1252, in which it is"),
        ("a.csv", b"review,stars\na b,1\nreview,stars\nc,0\n", "no column 'sentence' or 'text' among review, stars"),
        (
            "a.jsonl",
            b'{"text": "caf\xe9", "label": 1}\n{"text": "\xe9t\xe9", "label": 0}\n',
            "line 1: not UTF-8; use --encoding cp1252",
        ),
        ("a.jsonl", b'{"text": 5, "label": 1}\n', "line 1: 1 row cannot be used: 1 without text"),
        ("a.jsonl", b'{"text": "x", "label": true}\n', "line 1: label 'true' is neither"),
        ("a.jsonl", b'{"text": "x", "label": null}\n', "1 without a label"),
        ("a.jsonl", b'{"text": "x", "label": [1, 0]}\n', "line 1: label '[1, 0]' is neither"),
        ("a.jsonl", b'{"text": "x", "label": 1}\n{"text": "x"}\n', "1 without a label (line 2: '')"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "x"}\n', "line 1: no column 'label' among text"),
        ("a.json", b'[{"x": {"text": "x"}, "label": 1}]', "rows are nested; write flat ones, e.g. jq -c '.[] | {text"),
        (
            "a.jsonl",
            b'{"x": [{"text": "x"}], "label": 1}\n',
            "rows are nested; write flat ones, e.g. jq -c '{text: .document",
        ),
        ("a.jsonl", b'{"text": "\\ud83d", "label": 1}\n', "1 with truncated or invalid characters (line 1)"),
        ("a.jsonl", b'{"text": "\\u0000", "label": 1}\n', "1 with truncated or invalid characters (line 1)"),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    line = refusal(rows, tmp_path / name, content)
    assert name in line and says in line


def test_columns_must_differ_and_several_texts_are_joined(tmp_path: Path) -> None:
    content = b"title,body,label\nGood,a fine film,1\n,a poor one,0\n"
    expected = [("Good a fine film", None, 1), ("a poor one", None, 0)]
    assert rows(tmp_path / "a.csv", content, options=ReadOptions(("title", "body"))) == expected
    assert "column 'body' is named twice" in refusal(
        rows, tmp_path / "a.csv", content, options=ReadOptions("2", "body")
    )
    assert "1 without text (line 3)" in refusal(rows, tmp_path / "a.csv", content, options=ReadOptions("body", "title"))
    line = refusal(rows, tmp_path / "a.csv", content, options=ReadOptions("4"))
    assert "has 3 columns, from 1 to 3: there is no --text-column 4" in line
    line = refusal(rows, tmp_path / "a.jsonl", b'{"text": "x", "label": 1}\n', options=ReadOptions("1"))
    assert "no column '1' among text, label" in line, "the order of an object's keys is none"


MISSING = ["", " ", "NULL", "null", "NaN", "nan", "NA", "N/A", "None", "-", "?", "<NA>", "-1"]


@pytest.mark.parametrize("missing", MISSING)
def test_what_stands_for_no_label_is_never_a_class(tmp_path: Path, missing: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f"text,label\na,0\nb,1\nc,{missing}\nd,1\n,1\ne,{missing}\n")
    found = inspect(file, ReadOptions())
    task = SingleLabel(names_of(found.labels, file))
    assert task.label_names == ["0", "1"]
    line = refusal(found.check, file, task, drop=False)
    assert "line 4: 3 of 6 rows " in line and " 1 without text (line 6), 2 without a label (line 4" in line
    assert found.check(file, task, drop=True) == {"no text": 1, "no label": 2}
    assert [row.text for row in read_rows(file, ReadOptions(drop_unusable=True), task)] == ["a", "b", "d"]
    if missing not in ("", " ", "-1"):
        named = SingleLabel([missing, "0", "1"])
        assert found.check(file, named, drop=True) == {"no text": 1}, "a name that is given is a class"


def test_numbers_stand_for_names_in_their_order() -> None:
    def numbers(names: str, *labels: str) -> dict[str, int]:
        return resolve_label_names(names.split(","), labels, "a.csv")[1]

    assert numbers("a,b,c", "2", "0") == {"0": 0, "1": 1, "2": 2}
    assert numbers("a,b,c", "1", "2", "3") == numbers("a,b,c", "1.0", "3") == {"1": 0, "2": 1, "3": 2}
    assert numbers("a,b,c", "10", "30", "20") == {"10": 0, "20": 1, "30": 2}
    assert numbers("a,b", "-1", "0", "1") == {"0": 0, "1": 1}, "-1 is no label"
    assert numbers("4=a,7=b", "4") == {"4": 0, "7": 1}
    assert numbers("a,b", "x", "y") == {"0": 0, "1": 1}
    assert numbers("2,1", "1", "2") == {}, "names"
    assert "give each name its number" in refusal(numbers, "a,b,c", "1", "2")


def test_labels_that_mean_the_same_are_named() -> None:
    labels = ["Positive", "positive", "positive.", "pos\u200bitive", "neg", "1", "-1", "1.0"]
    said = "labels that differ only in case, spaces or punctuation: Positive, positive, positive., pos\u200bitive"
    assert label_notes(dict.fromkeys(labels, 9)) == [said]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["1", "0", "1"], ["0", "1"]),
        ([1, 0.0, "1.0"], ["0", "1"]),
        ([True, False], ["false", "true"]),
        (["none", "FAVOR", "NONE"], ["FAVOR", "NONE", "none"]),
        (["positive", "negative"], SST2_NAMES),
        (["10", "9", "2"], ["2", "9", "10"]),
        (["1", "-1"], ["-1", "1"]),
        (["+1", "-1"], ["-1", "1"]),
        ([3, 1, 2, 1], ["1", "2", "3"]),
        (["2", "0", "1"], ["0", "1", "2"]),
        (["so-so", "bad", " good"], ["bad", "good", "so-so"]),
        (["True", "False"], ["False", "True"]),
        (["01", "02"], ["01", "02"]),
        (["9" * 5000, "8" * 5000], ["8" * 5000, "9" * 5000]),
        (["न", "क"], ["क", "न"]),
        (["\u0966", "\u0967"], ["\u0966", "\u0967"]),
    ],
)
def test_names_of_the_classes_from_the_training_file(tmp_path: Path, labels: list[object], names: list[str]) -> None:
    file = labels_file(tmp_path, labels)
    assert find_label_names(file, ReadOptions()) == names
    assert {row.label for row in read_rows(file, ReadOptions(), SingleLabel(names))} == set(range(len(names)))


def test_numbers_that_were_named_win_over_those_in_the_names(tmp_path: Path) -> None:
    file, names = labels_file(tmp_path, [2, 1]), ["LABEL_0", "LABEL_1"]
    task = SingleLabel(names, label_ids={"1": 0, "2": 1})
    assert [row.label for row in read_rows(file, ReadOptions(), task)] == [1, 0]


def test_a_thousand_classes_and_not_one_more_of_which_only_some_are_listed(tmp_path: Path) -> None:
    labels: list[object] = [f"class {i:04}" for i in range(1000)]
    assert find_label_names(labels_file(tmp_path, labels), ReadOptions()) == labels
    line = refusal(find_label_names, labels_file(tmp_path, [*labels, "one more"]), ReadOptions())
    assert "line 1002: more than 1,000 different labels; " in line and "--label-column" in line
    line = refusal(rows, tmp_path / "a.tsv", b"text\tlabel\nx\tz\n", ["a", *(f"a{i}" for i in range(1000))])
    assert "a, a0, a1, " in line and " and 991 more" in line and len(line) < 300


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["1", "1"], "all rows have the label '1'; name the label column with --label-column"),
        (["?", "NULL"], "no row has a label; name the label column with --label-column"),
        (["0.5", "0.7"], "line 2: label '0.5' is a fraction, but a class is an integer or a word; use --task"),
        (["1,0", "4,5"], "line 2: label '1,0' is a score with a decimal comma or several labels; use --task reg"),
        (["27", "4,27"], "line 3: label '4,27' is several labels, but a row has one label in this task; use"),
        ([["a"], ["a", "b"]], 'line 2: label \'["a", "b"]\' is several labels'),
        (["good", "1", "bad"], "integers and words as labels ('1' in line 3, 'bad' in line 4)"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, labels: list[object], says: str) -> None:
    line = refusal(find_label_names, file := labels_file(tmp_path, labels), ReadOptions())
    assert file.name in line and says in line


@pytest.mark.parametrize(
    ("content", "labelled"),
    [
        (b"index\tsentence\n0\tx\n", False),  # GLUE's
        (b"sentence\tlabel\nx\t-1\ny\t-1\n", False),  # the Hub's
        (b"sentence\tlabel\nx\t-1\ny\t1\n", True),  # -1 is a class
        (b"sentence\tlabel\nx\t\ny\t?\n", False),
        (b"sentence\tlabel\n", False),
    ],
)
def test_whether_a_test_file_has_labels(tmp_path: Path, content: bytes, labelled: bool) -> None:
    (tmp_path / "test.tsv").write_bytes(content)
    assert has_labels(tmp_path / "test.tsv", ReadOptions()) == labelled


@pytest.mark.skipif(not SST2.is_dir(), reason=f"the real SST-2 is not at {SST2}")
def test_real_sst2_has_all_its_rows() -> None:
    for split, count in (("train", 67_349), ("dev", 872), ("test", 1_821)):
        task = None if split == "test" else SingleLabel(SST2_NAMES)
        assert sum(1 for _ in read_rows(SST2 / f"{split}.tsv", ReadOptions(), task)) == count
    assert find_label_names(SST2 / "train.tsv", ReadOptions()) == SST2_NAMES
    assert not has_labels(SST2 / "test.tsv", ReadOptions())


def test_sample_data_is_whole_balanced_and_its_splits_share_no_sentence() -> None:
    counts: dict[str, int] = {}
    seen: set[str] = set()
    for file in sorted(SAMPLE_DATA.glob("*.tsv")):
        rows = list(read_rows(file, ReadOptions(), SingleLabel(SST2_NAMES)))
        counts[file.stem] = len(rows)
        assert sum(row.label for row in rows) * 2 == len(rows), f"{file.name} is not balanced"
        texts = {row.text.casefold() for row in rows}
        assert len(texts) == len(rows), f"{file.name} has a sentence twice"
        assert not texts & seen, f"{file.name} shares a sentence with another file"
        seen |= texts
    assert counts.pop("train") >= 600 and counts.pop("dev") >= 150
    assert len(counts) >= 8 and set(counts.values()) == {40}
