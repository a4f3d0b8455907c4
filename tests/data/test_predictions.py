"""The cells that prediction adds to a file's rows."""

from pathlib import Path

import pytest

from sst2_xlmr.data.formats import SourceRow
from sst2_xlmr.data.predictions import extended_rows
from sst2_xlmr.data.rows import Row
from sst2_xlmr.labels import split_labels


@pytest.mark.parametrize(
    ("labels", "cell"),
    [([], ""), (["joy"], "joy"), (["joy", "love"], "joy,love"), (["joy", "fear, awe"], '["joy", "fear, awe"]')],
)
def test_a_list_of_labels_in_a_tables_cell_is_read_back(labels: list[str], cell: str) -> None:
    row = Row("fine", None, None, SourceRow(2, ["text"], ["fine"]), 1.0)
    written = extended_rows(Path("a.tsv"), [row], [[labels]], ["labels"], ["text"], header=True)
    assert written == f"text\tlabels\nfine\t{cell}\n"
    found = split_labels(cell, None, ["joy", "love", "fear, awe"])
    assert (list(found) if isinstance(found, dict) else [found] if found else []) == labels
