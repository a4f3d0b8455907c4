"""Rows: what each format means, and what is said of bad files."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SST2

from sst2_xlmr.config import UserError
from sst2_xlmr.data import find_split, has_column, read_rows

NAMES = ["negative", "positive"]


def rows(path: Path, content: bytes, names: list[str] = NAMES) -> list[tuple[str, int]]:
    path.write_bytes(content)
    return list(read_rows(path, "sentence", "label", names))


EXPECTED = [('"quoted at the start', 1), ("plain, with comma", 0)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", b'sentence\tlabel\n"quoted at the start\t1\nplain, with comma\t0\n'),
        ("no_end.tsv", b'sentence\tlabel\n"quoted at the start\t1\nplain, with comma\t0'),
        ("crlf.tsv", b'sentence\tlabel\r\n"quoted at the start\t1\r\nplain, with comma\t0\r\n'),
        ("bom.tsv", b'\xef\xbb\xbfsentence\tlabel\n"quoted at the start\t1\nplain, with comma\t0\n\n'),
        ("columns.tsv", b'id\tlabel\tsentence\n7\t1\t"quoted at the start\n8\t0\tplain, with comma\n'),
        ("names.tsv", b'sentence\tlabel\n"quoted at the start\tpositive\nplain, with comma\tnegative\n'),
        ("a.csv", b'sentence,label\n"""quoted at the start",1\n"plain, with comma",0\n'),
        ("bom.csv", b'\xef\xbb\xbfsentence,label\r\n"""quoted at the start",1\r\n"plain, with comma",0\r\n'),
        (
            "a.jsonl",
            b'{"sentence": "\\"quoted at the start", "label": 1}\n{"sentence": "plain, with comma", "label": "0"}\n',
        ),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    assert rows(tmp_path / name, content) == EXPECTED


def test_csv_text_may_have_line_ends_and_tsv_text_other_separators(tmp_path: Path) -> None:
    assert rows(tmp_path / "a.csv", b'sentence,label\n"two\nlines",1\n') == [("two\nlines", 1)]
    text = "next\u2028line\x0bstays"  # str.splitlines would cut here
    assert rows(tmp_path / "a.tsv", f"sentence\tlabel\n{text}\t1\n".encode()) == [(text, 1)]


def test_names_that_look_like_numbers_are_names(tmp_path: Path) -> None:
    assert rows(tmp_path / "a.tsv", b"sentence\tlabel\nx\t1\ny\t0\n", ["1", "0"]) == [("x", 0), ("y", 1)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.tsv", b"", "has no rows"),
        ("a.tsv", b"sentence\tlabel\n", "has no rows"),
        ("a.tsv", b"text\tlabel\nx\t1\n", "line 2: no column 'sentence' among text, label"),
        ("a.tsv", b"sentence\tlabel\nx\t1\ny\n", "line 3: 1 columns, but the header has 2"),
        ("a.tsv", b"sentence\tlabel\nx\t1\t2\n", "line 2: 3 columns"),
        ("a.tsv", b"sentence\tlabel\nx\t1\n \t0\n", "line 3: column 'sentence' holds no text"),
        ("a.tsv", b"sentence\tlabel\nx\t2\n", "line 2: label '2'"),
        ("a.tsv", b"sentence\tlabel\nx\t-1\n", "line 2: label '-1'"),
        ("a.tsv", b"sentence\tlabel\nx\tgood\n", "line 2: label 'good'"),
        ("a.tsv", b"sentence\tlabel\nx\t1\n\ny\t0\n", "line 3: empty line between rows"),
        ("a.tsv", b"sentence\tlabel\nx\t1\ncaf\xe9\t0\n", "line 3: not UTF-8 (byte 4"),
        ("a.tsv", "sentence\tlabel\nx\t1\n".encode("utf-16"), "is UTF-16"),
        ("a.csv", b'sentence,label\n"x,1\n', "not valid CSV"),
        ("a.csv", b"sentence,label\nx,y,1\n", "line 2: 3 columns"),
        ("a.csv", b"sentence,label\nx,1\ncaf\xe9,0\n", "line 3: not UTF-8"),
        ("a.jsonl", b'{"sentence": "x", "label": 1}\n{"sentence"\n', "line 2: not JSON"),
        ("a.jsonl", b'["x", 1]\n', "line 1: not a JSON object"),
        ("a.jsonl", b'{"sentence": 5, "label": 1}\n', "line 1: column 'sentence' holds no text"),
        ("a.jsonl", b'{"sentence": "x", "label": true}\n', "line 1: label 'True'"),
        ("a.txt", b"sentence\tlabel\nx\t1\n", "unknown kind of file"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    with pytest.raises(UserError, match="a[.](tsv|csv|jsonl|txt)") as error:
        rows(tmp_path / name, content)
    assert says in str(error.value)


def test_find_split_takes_the_one_file_there_is(tmp_path: Path) -> None:
    assert find_split(tmp_path, "train") is None
    (tmp_path / "train.csv").touch()
    assert find_split(tmp_path, "train") == tmp_path / "train.csv"
    (tmp_path / "train.tsv").touch()
    with pytest.raises(UserError, match="train.tsv and train.csv"):
        find_split(tmp_path, "train")


@pytest.mark.skipif(not SST2.is_dir(), reason=f"the real SST-2 is not at {SST2}")
def test_real_sst2_has_all_its_rows() -> None:
    counts = [sum(1 for _ in read_rows(SST2 / f"{s}.tsv", "sentence", "label", NAMES)) for s in ("train", "dev")]
    assert counts == [67_349, 872]
    assert not has_column(SST2 / "test.tsv", "label")
