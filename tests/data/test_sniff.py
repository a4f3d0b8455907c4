"""How a file is to be read, found from its content: as it was written, or an error says why not."""

import csv
import gzip
import io
import itertools
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sst2_xlmr.config import Config
from sst2_xlmr.data.prepare import inspect_splits
from sst2_xlmr.data.rows import Row, inspect, read_rows
from sst2_xlmr.data.sniff import ReadOptions, find_layout, other_encoding
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.util.errors import UserError

TEXTS = ['He said "wow", twice', "plain", "a; b | c", "tab\there", "two\nlines", '"quoted"', "it's 'so'", "C:\\new \\"]
ROWS = [[text, "10"[number % 2]] for number, text in enumerate(TEXTS)]


def written(rows: list[list[str]], header: bool = True, **dialect: Any) -> str:
    text = io.StringIO()
    csv.writer(text, **{"lineterminator": "\n", **dialect}).writerows([["text", "label"], *rows] if header else rows)
    return text.getvalue()


def read(path: Path, content: bytes | str, *text: str, **asked: Any) -> list[list[str | None]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    options = ReadOptions(text or None, **asked)
    cells = [(row.text, dict(zip(row.source.names, row.source.cells))) for row in read_rows(path, options, None)]
    return [[text, row.get(options.label, list(row.values())[-1])] for text, row in cells]


def labelled(path: Path) -> list[Row]:
    return list(read_rows(path, ReadOptions(), SingleLabel(["x", "y"])))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", "\t,;|")
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.txt"])
def test_dialects(tmp_path: Path, name: str, delimiter: str, ending: str) -> None:
    for quoting, encoding in itertools.product((csv.QUOTE_MINIMAL, csv.QUOTE_ALL), ("utf-8", "utf-8-sig", "utf-16")):
        # csv.writer does not quote a lone \n where rows end in \r.
        rows = [row for row in ROWS if "\n" not in row[0] or ending != "\r" or quoting == csv.QUOTE_ALL]
        content = written(rows, delimiter=delimiter, quoting=quoting, lineterminator=ending).encode(encoding)
        assert read(tmp_path / name, content) == rows


QUOTED = ['good "one"', "so, so", "tab\there", "C:\\new", "end \\"]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (written([[text, "x"] for text in QUOTED], escapechar="\\", doublequote=False), QUOTED),
        (written([[t, "x"] for t in QUOTED], escapechar="\\", doublequote=False, delimiter="\t", quoting=1), QUOTED),
        ('"text"\t"label"\n"1"\t"he \\"said\\""\t"x"\n"2"\t"C:\\new"\t"y"\n', ['he "said"', "C:\\new"]),  # R
        (written([["it's; so", "x"], ["say 'hi'", "y"]], delimiter=";", quotechar="'"), ["it's; so", "say 'hi'"]),
        ("text,label\n'tis so,x\n'twas not 'so',y\n", ["'tis so", "'twas not 'so'"]),
        ('text\tlabel\n"open only\tx\nthe "end"\ty\n" both "\tz\n', ['"open only', 'the "end"', '" both "']),  # GLUE
        ('text\tlabel\n"Wow"\tx\nno\ty\n', ['"Wow"', "no"]),  # perhaps CSV's, perhaps not
        ('text\tlabel\n"a\tx\nb"\ty\n"say ""c"""\ty\n', ['"a', 'b"', '"say ""c"""']),  # each line is a row
        ('text,label\n"good" film,x\nbad,y\n', ['"good" film', "bad"]),
        ('text,label\n"a ""b"" c",x\nd\re,y\n', ['a "b" c', "d\re"]),  # a lone carriage return
        ("text,label\na &amp; b; c,x\nd; e,y\n", ["a &amp; b; c", "d; e"]),
        ("text:::label\na b:::x\nc d:::y\n", None),
    ],
)
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.txt"])
def test_quotes(tmp_path: Path, name: str, content: str, texts: list[str] | None) -> None:
    asked = {} if texts else {"delimiter": ":::"}
    assert [text for text, _ in read(tmp_path / name, content, **asked)] == (texts or ["a b", "c d"])


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.csv", "id,text,label\n1,a b,x,\n2,c d,y,\n", ["a b", "c d"]),  # a delimiter ends the rows only
        ("a.csv", "'text';'label'\n'a; b\nc';'x'\n'd';'y'\n", ["a; b\nc", "d"]),
        ("a.txt", 'text\tlabel\n"well, a"\tx\nb\ty\n"so, c"\ty\n', ["well, a", "b", "so, c"]),  # Excel's Unicode text
        ("a.txt", 'text\tlabel\n"well, a"\tx\nb, c\ty\n"so, d"\ty\n', ['"well, a"', "b, c", '"so, d"']),
        ("a.tsv", 'text\tlabel\n"a"\tx\n"b"\ty\n"c"\ty\n', ["a", "b", "c"]),  # all cells but the header
    ],
)
def test_tables_that_programs_write(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    assert [text for text, _ in read(tmp_path / name, content, "text")] == texts


def test_quotes_that_come_after_what_is_looked_at_first(tmp_path: Path) -> None:
    plain = [[f"text number {i} {'x' * 100}", "1"] for i in range(15_000)]
    for cell, text in (('"say ""hi"""', 'say "hi"'), ('"say', '"say')):
        assert read(tmp_path / "a.tsv", f"{written(plain, delimiter=chr(9))}{cell}\t0\n")[-1] == [text, "0"]


@pytest.mark.parametrize(
    ("content", "first"),
    [
        ("I loved it,pos\nbad film,neg\nfine by me,pos\n", "I loved it"),  # a label of other rows
        ("I loved it,1\nbad film,0\nso,2\n", "I loved it"),  # a number among numbers
        ("0,1\nI loved it,1\nbad film,0\nfine by me,1\n", "I loved it"),  # pandas' names
        ('"V1","V2"\n"I loved it","pos"\n"bad","neg"\n', "I loved it"),  # R's
        ("review,stars\nI loved it,5\nbad film,1\n", "I loved it"),  # a word above numbers
        ("v1,v2,,\nham it is,x,,\nspam it is,y,,\nham,x,,\nspam,y,,\n", "ham it is"),
        ("标签,评论\n距离川沙公路较近,1\n很差,0\n", "距离川沙公路较近"),
        ("@user hi there!,OTHER\n@user you,OFFENSE\n", "@user hi there!"),  # no name of a column
    ],
)
def test_header(tmp_path: Path, content: str, first: str) -> None:
    for delimiter in ",;|\t":
        found = read(tmp_path / "a.csv", content.replace(",", delimiter), "1", label="2")
        assert (found[0][0], len(found)) == (first, content.count("\n") - (not content.startswith(first)))


PROSE = ["Good, but not, really great", "Nice, too, really", "Well, no, never"]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("header", ["", "text\n"])
def test_commas_of_prose_part_no_columns(tmp_path: Path, header: str, rows: int) -> None:
    lines = "".join(f"{line}\n" for line in PROSE[:rows])
    (tmp_path / "a.txt").write_text(header + lines)
    options = ReadOptions(("text",) if header else None, may_be_empty=True)
    assert [row.text for row in read_rows(tmp_path / "a.txt", options, None)] == PROSE[:rows]


@pytest.mark.parametrize("mark", [";", " |", "\t"])
def test_one_other_delimiter_in_every_text_is_text(tmp_path: Path, mark: str) -> None:
    rows = [[f"good{mark} film {number}", "10"[number % 2]] for number in range(9)]
    content = written([row[::-1] for row in rows], header=False, quoting=csv.QUOTE_ALL)
    assert read(tmp_path / "a.csv", content, "2", label="1") == rows


@pytest.mark.parametrize("header", ["text", "text,label"])
def test_a_text_with_commas_is_no_row_name(tmp_path: Path, header: str) -> None:
    label = ",x" * header.count(",")
    content = f"{header}\n" + "".join(f"{text}, really{label}\n" for text in ("I like it", "No", "Fine"))
    says = "3 with another number of columns .*; a cell that contains ',' must be in quotes"
    says += "" if label else ", or .* tab$"
    assert re.search(says, refusal(read, tmp_path / "a.csv", content, "text"))
    numbered = content.replace("I like it", "1").replace("No", "2").replace("Fine", "3")
    assert [text for text, _ in read(tmp_path / "a.csv", numbered, "text")] == [" really"] * 3, "as R writes them"


ROW = {"text": "a b", "label": "x"}
DOCUMENTS = [
    f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n",
    json.dumps([ROW, ROW]),
    json.dumps([ROW, ROW], indent=2),
    json.dumps({"data": [ROW, ROW]}),
    json.dumps({key: {"0": value, "1": value} for key, value in ROW.items()}),
    json.dumps({key: [value, value] for key, value in ROW.items()}, indent=1),
    json.dumps({"version": 1, "data": [ROW, ROW]}),
    json.dumps({"schema": {"fields": []}, "data": [ROW, ROW]}, indent=1),
    json.dumps({"0": ROW, "1": ROW}),
    json.dumps({"columns": list(ROW), "index": [0, 1], "data": [list(ROW.values())] * 2}),
]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".txt", ".jsonl.gz", ".json.zip"])
@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_json_by_content(tmp_path: Path, document: str, ending: str) -> None:
    content, path = document.encode(), tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    if ending.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as file:
            for name in ("__MACOSX/._a.json", ".DS_Store", "a.json"):  # as macOS packs it
                file.writestr(name, content)
    assert [(row.text, row.source.cells[1]) for row in read_rows(path, ReadOptions(), None)] == [("a b", "x")] * 2


def test_a_row_with_nested_lists_is_a_row(tmp_path: Path) -> None:
    row = {"text": "a b", "label": "x", "spans": [{"text": "a", "label": "y"}]}
    assert read(tmp_path / "a.jsonl", json.dumps(row)) == [["a b", "x"]]
    assert "JSON, but not a table" in refusal(read, tmp_path / "a.jsonl", json.dumps(row, indent=1))


def test_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("__label__x good film\r\n__label__y bad\n__label__x\n")
    assert list(inspect(tmp_path / "a.tsv", ReadOptions()).labels) == ["x", "y"]
    for label, text in (("neg", "poor\n"), ("pos", "fine\nfilm"), ("unsup", "no label")):
        (tmp_path / "folder" / label).mkdir(parents=True)
        (tmp_path / "folder" / label / "1.txt").write_text(text)
    found = [(row.text, row.source.cells[1]) for row in read_rows(tmp_path / "folder", ReadOptions(), None)]
    assert found == [("poor", "neg"), ("fine\nfilm", "pos"), ("no label", None)]
    for name, content in (("dev_text.txt", "a\nb\n"), ("dev_labels.txt", "1\n0\n"), ("mapping.txt", "0\tno\n1\tyes\n")):
        (tmp_path / name).write_text(content)
    assert list(inspect(tmp_path / "dev_text.txt", ReadOptions()).labels) == ["yes", "no"]
    (tmp_path / "dev_labels.txt").write_text("1\x0b\n0\n")
    assert len(inspect(tmp_path / "dev_text.txt", ReadOptions()).labels) == 2, "a line ends with a line feed only"
    (tmp_path / "dev_labels.txt").write_text("1\n")
    (tmp_path / "folder" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert "has several splits; name one of its folders" in refusal(inspect, tmp_path / "folder", ReadOptions())
    assert re.search("2 lines, but .* has 1", refusal(inspect, tmp_path / "dev_text.txt", ReadOptions()))


def test_parquet_and_excel(tmp_path: Path) -> None:
    openpyxl, parquet, arrow = (pytest.importorskip(name) for name in ("openpyxl", "pyarrow.parquet", "pyarrow"))
    info = {b"huggingface": json.dumps({"info": {"features": {"label": {"names": ["no", "yes"]}}}}).encode()}
    table = arrow.table({"text": ["a b", "c\nd", "e"], "label": [1, 0, -1]})
    parquet.write_table(table.replace_schema_metadata(info), tmp_path / "a.parquet")
    assert inspect(tmp_path / "a.parquet", ReadOptions()).labels == {"yes": [1, 1], "no": [1, 2], "-1": [1, 3]}
    parquet.write_table(arrow.table({"text": ["a"] * 99 + ["b\0"], "label": ["x"] * 100}), tmp_path / "b.parquet")
    assert "1 with truncated or invalid characters" in refusal(labelled, tmp_path / "b.parquet")
    book = openpyxl.Workbook()
    for row in (["text", "label"], ["a b", 1.0], ["c", 2], [2012, None]):
        book.active.append(row)
    book.save(tmp_path / "a.csv")  # whatever its name
    assert inspect(tmp_path / "a.csv", ReadOptions()).labels == {"1": [1, 2], "2": [1, 3], "": [1, 4]}
    assert find_layout(tmp_path / "a.csv").notes == ()
    book.create_sheet("more")
    book.save(tmp_path / "a.xlsx")
    assert find_layout(tmp_path / "a.xlsx").notes == ("only sheet 'Sheet' is read, not 'more'; save those as CSV",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xd0\xcf\x11\xe0" + bytes(20), "old Excel workbook .* CSV"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><p>404", "web page"),
        (b"great stuff,pos\nbad stuff,neg\n", "use --header or --no-header"),
        (b'text, label\n"a", "x"\n"b, c", "y"\n', "spaces before its quotes.* sed 's/, [*]\"/,\"/g'"),
        (b"sep=;\ntext;label\na;x\nb;y\n", "line 1, 'sep=', is not part of the table; keep the rest: tail -n [+]2"),
        (b"Report of 2021,,\ntext,label,n\na,x,1\nb,y,2\n", "line 1, 'Report of 2021', is not part"),
        (b"# by A\n# CC0\ntext,label\na,x\nb,y\n", "lines 1 to 2 are not part .* tail -n [+]3 FILE"),
        (b"text,label\nso l\xe0,x\nd\xe9j\xe0 vu,y\n", "--encoding cp1252, in which it is 'so l\xe0,x', or another"),
        (b"\x80\x04\x95", "pickle"),
        (b"(3 (2 (2 The) (2 Rock)) (2 .))\n", "parse trees .* python -c"),
        ("text,label\nabc,1\n".encode("utf-16-le"), "--encoding utf-16-le"),
        (b'{"train": [["a", "x"]], "val": [["b", "y"]]}', r"several tables \(train, val\); write each"),
        (b'text,label\n"never closed,1\nb,0\n', "line 2 is not valid CSV: unexpected end .* --quoting none"),
        (b"DESC:manner How so ?\nENTY:food What is it ?\n", "one column of texts, without labels; .* --delimiter"),
        (b"0,1,2\n1,a good film,0\n2,a bad one,1\n3,so so,0\n4,no no,1\n", "--text-column 2 --label-column 3"),
        (b'"the text\n(here)",label\na film,x\na play,y\na film,x\na play,y\n', "--text-column 1 --label-column label"),
    ],
)
def test_what_is_no_table_is_named_with_a_fix(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert re.search(says, refusal(labelled, tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Das Gebäude ist schön, die Tür zu", "cp1252"),
        ("WINNER! £900, “now”, at the café", "cp1252"),
        ("Очень скучная книга, я не дочитал её до конца", "cp1251"),
        ("这家店的服务太差了,再也不来了。距离川沙公路较近", "gb18030"),
        ("この本を読んで本当によかった。とても面白い", "cp932"),
    ],
)
def test_encodings_are_proposed(text: str, encoding: str) -> None:
    assert other_encoding(text.encode(encoding)) == encoding
    assert other_encoding("".join(f"café {i}\n" for i in range(30)).encode() + b"caf\xe9\n") == "", "one damaged row"
    assert other_encoding("naïve\tx\ncut in caf".encode() + b"\xc3\t1\nend \xe2\x80\n") == "", "cut characters"


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufdd0"), min_size=1, max_size=12).filter(str.strip)
dialects = {
    "delimiter": st.sampled_from("\t,;|"),
    "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    "lineterminator": st.sampled_from(["\n", "\r\n", "\r"]),
}


@settings(derandomize=True, database=None, deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(cells, min_size=1, max_size=8), kind=st.sampled_from(["csv", "tsv", "txt"]), **dialects)
def test_any_table_is_read_as_written(tmp_path_factory: Any, texts: list[str], kind: str, **dialect: Any) -> None:
    """Or an error says that nobody can tell; never other rows or cells."""
    rows = [[text, "ab"[i % 2]] for i, text in enumerate(texts)]
    try:
        found = read(tmp_path_factory.mktemp("x") / f"a.{kind}", written(rows, **dialect))
    except UserError:
        return
    assert found == rows


TABLE = "a fine film,good\nwhat a dull and long story,bad\nso long and so dull,bad\n"


@pytest.mark.parametrize(
    ("content", "task", "says"),
    [
        (f"# made by x, v2\ntext,label\n{TABLE}", "auto", "line 1, '# made by x', is not part of the table; keep the"),
        (f"text,label\n{TABLE}text,label\n{TABLE}", "auto", "line 5: 1 of 7 rows cannot be used: 1 that repeat"),
        ("text|label\n--- | ---\n" + TABLE.replace(",", "|"), "auto", "line 2: 1 of 4 rows cannot be used: 1 that rep"),
        ("\udcdcberschrift;label\nein guter Film;gut\n", "auto", "line 1: not UTF-8; use --encoding cp1252"),
        ('text,label\nso much,"1,000"\nso little,7\n', "regression", "'1,000' has a decimal comma or one that"),
        ("\0" * 257 + "ustar" + "\0" * 300, "auto", "is a tar archive; unpack it first"),
        ("", "auto", "is a pipe or a device, not a file; save what it holds to a file first"),
    ],
)
def test_what_is_no_row_is_never_one(tmp_path: Path, content: str, task: str, says: str) -> None:
    file = tmp_path / "rows.csv"
    if content:
        file.write_bytes(content.encode(errors="surrogateescape"))
    else:
        os.mkfifo(file)
    assert says in refusal(inspect_splits, Config(train_file=[str(file)], task=task))


@pytest.mark.parametrize("cells", [["[0, 1]", "[1, 0]"], ["[0.0, 1.0]", "[1, 0]"], ["[0, 1]", "[1, 0]", "[0, 0]"]])
def test_lists_of_one_number_per_label(tmp_path: Path, cells: list[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"text": "text {i}", "label": {cell}}}\n' for i, cell in enumerate(cells)))
    task, splits = inspect_splits(Config(train_file=[str(file)], task="multi-label"))
    assert [row.label.tolist() for _, row in splits["train"].rows(task)] == [json.loads(cell) for cell in cells]
