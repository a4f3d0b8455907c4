"""Files of rows: what each format means, what is said of bad files; rows come back as they were written."""

import gzip
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import Patch, find_label_names, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sst2_xlmr.data import formats
from sst2_xlmr.data.formats import SourceRow, kind_of, read_source, row_text
from sst2_xlmr.data.rows import read_rows
from sst2_xlmr.data.sniff import ReadOptions, find_layout
from sst2_xlmr.data.splits import find_split
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.util.files import new_file


def fields_of(path: Path, header: bool = True) -> list[SourceRow]:
    return list(read_source(path, find_layout(path, ReadOptions(header=header))))


def read(path: Path, content: bytes, header: bool = True) -> list[dict[str, Any]]:
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return [dict(zip(source.names, source.cells)) for source in fields_of(path, header)]


EXPECTED = [{"text": '"quoted at the start', "n": "1"}, {"text": "plain, with comma", "n": "0"}]
CASES = [
    ("a.tsv", b'text\tn\n"quoted at the start\t1\nplain, with comma\t0\n'),
    ("CAPITALS.TSV", b'text\tn\n"quoted at the start\t1\nplain, with comma\t0\n'),
    ("no_end.tsv", b'text\tn\n"quoted at the start\t1\nplain, with comma\t0'),
    ("spaces.tsv", b'text \t n\n"quoted at the start\t1\nplain, with comma\t0\n'),
    ("blank.csv", b'text,n\n\n"""quoted at the start",1\n\n"plain, with comma","0"\n\n'),
    ("a.jsonl", b'{"text": "\\"quoted at the start", "n": "1"}\r\n{"text": "plain, with comma", "n": "0"}\n'),
]


@pytest.mark.parametrize("ending", ["", ".gz", ".GZ"])
@pytest.mark.parametrize(("name", "content"), CASES)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, content: bytes, ending: str) -> None:
    assert read(tmp_path / (name + ending), content) == EXPECTED


def test_without_a_header_columns_have_numbers(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", b"x,1\ny,0\n", header=False) == [{"1": "x", "2": "1"}, {"1": "y", "2": "0"}]
    assert read(tmp_path / "a.jsonl", b'{"a": 1}\n', header=False) == [{"a": 1}]

    (tmp_path / "a.csv").write_bytes(b'a,b\n"two\nlines",1\n\nx,2\n')
    assert [source.line for source in fields_of(tmp_path / "a.csv")] == [2, 5], "where rows begin"


WHOLE = gzip.compress(b"a\tb\n" + b"".join(b"%d\t1\n" % i for i in range(5000)), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.tsv", b"a\tb\nx\0y\t0\n", "line 2: has a NUL"),
        ("a.csv", b"a,b\nx\0y,0\n", "line 2: has a NUL"),
        ("a.tsv", "a\tb\nx\t1\n".encode("utf-16-le"), "line 1: has a NUL"),
        ("a.tsv", b"a\tb\n" + b"x" * 3000 + b"\t1\n", "line 2: longer than 2,000 characters"),
        ("a.csv", b'a,b\nx,1\n"x,1\ny,2\n', "the row at line 3 is not valid CSV: unexpected end of data; is a quot"),
        ("a.csv", b'a,b\nx,1\n"x,1\n' + b"y,2\n" * 600, "line 3 is not valid CSV: field larger than field limit"),
        ("a.jsonl", b'{"a": "x", "b": 1}\n{"a"\n', "line 2: not JSON"),
        ("a.jsonl", b"[" * 1900 + b"\n", "line 1: not JSON"),
        ("a.tsv.gz", None, "cannot read"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, name: str, content: bytes | None, says: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(formats, "MAX_CHARACTERS", 2000)
    line = refusal(fields_of, tmp_path / name) if content is None else refusal(read, tmp_path / name, content)
    assert name in line and says in line


HOLE, CHECKSUM = WHOLE[:100] + bytes(100) + WHOLE[200:], WHOLE[:-8] + bytes(4) + WHOLE[-4:]


@pytest.mark.parametrize("content", [WHOLE[:-4], WHOLE[:9000], WHOLE[:5], HOLE, CHECKSUM, b"a\tb\n"], ids=range(6))
def test_damaged_gzip_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tsv.gz").write_bytes(content)
    assert "a.tsv.gz is not a complete gzip file" in refusal(fields_of, tmp_path / "a.tsv.gz")


def test_find_split_takes_the_one_file_there_is(tmp_path: Path) -> None:
    assert find_split(tmp_path, "train", is_needed=False) == []
    assert re.search(r"no train\.tsv, .*it has nothing.*--train-file", refusal(find_split, tmp_path, "train"))
    (tmp_path / "train.csv.gz").touch()
    assert find_split(tmp_path, "train") == [tmp_path / "train.csv.gz"]
    (tmp_path / "train.tsv").touch()
    assert "train.csv.gz and train.tsv" in refusal(find_split, tmp_path, "train")
    for number in (1, 0):
        (tmp_path / f"test-0000{number}-of-00002.parquet").touch()
    assert [file.name[:10] for file in find_split(tmp_path, "test")] == ["test-00000", "test-00001"]


@pytest.mark.parametrize(
    ("name", "row", "written"),
    [
        ("x.tsv", ["tab\tand\r\nline", {"n": [1, None]}], b'tab and line\t{"n": [1, null]}\n'),
        ("x.csv", ["tab\tand\r\nline", None, 0.5, True], b'"tab\tand\r\nline",,0.5,true\r\n'),
        ("x.csv", [{"n": [1, None]}], b'"{""n"": [1, null]}"\r\n'),
        ("x.jsonl", ["half \ud800", 1], b'{"a": "half \\ud800", "b": 1}\n'),
    ],
)
def test_what_a_format_cannot_hold(tmp_path: Path, name: str, row: list[object], written: bytes) -> None:
    with new_file(tmp_path / name) as file:
        file.write(row_text(formats.kind_of(tmp_path / name), ["a", "b"], row))
    assert (tmp_path / name).read_bytes() == written


quick = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
ENDINGS = st.sampled_from([".tsv", ".csv", ".jsonl", ".tsv.gz", ".csv.gz", ".jsonl.gz"])
ASKED = {".tsv": "none"}  # as we write it; a text may look like CSV's quotes
NAMES = ["bad", 'so, "so"', "good", "1 star"]
# All that UTF-8 has, but NUL, which is no text.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
filled, cells = texts.filter(str.strip), texts | st.just("")


def write(path: Path, names: list[str], rows: list[list[str]]) -> None:
    with new_file(path) as file:
        for row in rows if kind_of(path) == ".jsonl" else [names, *rows]:
            file.write(row_text(kind_of(path), names, row))


def as_tsv_has_it(text: str) -> str:
    for characters in ("\r\n", "\r", "\n", "\t"):
        text = text.replace(characters, " ")
    return text


@quick
@given(ending=ENDINGS, rows=st.lists(st.tuples(filled, filled, st.integers(0, 3), cells), min_size=1, max_size=12))
def test_rows_come_back_as_they_were_written(ending: str, rows: list[tuple[str, str, int, str]]) -> None:
    """For training, and with all of their cells for prediction."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a" + ending)
        options = ReadOptions("one", "two", quoting=ASKED.get(kind_of(path)), header=True)
        written = [[NAMES[label], text, pair, other] for text, pair, label, other in rows]
        write(path, ["label", "one", "two", "other"], written)
        found = [row[:3] for row in read_rows(path, options, SingleLabel(NAMES))]
        whole = [list(row.source.cells) for row in read_rows(path, options, None)]
        seen = sorted({NAMES[label] for _, _, label, _ in rows})
        if len(seen) > 1:
            assert find_label_names(path, options) == seen
    expected = [[as_tsv_has_it(cell) for cell in row] if kind_of(path) == ".tsv" else row for row in written]
    assert whole == expected
    assert found == [(text, pair, NAMES.index(label)) for label, text, pair, _ in expected]
