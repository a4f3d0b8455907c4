"""The sample data is whole, balanced, and its splits share no sentence."""

from __future__ import annotations

from conftest import SAMPLE_DATA

from sst2_xlmr.data.rows import Columns, read_rows
from sst2_xlmr.task import SST2_NAMES, SingleLabel


def test_sample_data() -> None:
    counts: dict[str, int] = {}
    seen: set[str] = set()
    for file in sorted(SAMPLE_DATA.glob("*.tsv")):
        rows = list(read_rows(file, Columns(), SingleLabel(SST2_NAMES)))
        counts[file.stem] = len(rows)
        assert sum(row.label for row in rows) * 2 == len(rows), f"{file.name} is not balanced"
        texts = {row.text.casefold() for row in rows}
        assert len(texts) == len(rows), f"{file.name} has a sentence twice"
        assert not texts & seen, f"{file.name} shares a sentence with another file"
        seen |= texts
    assert counts.pop("train") >= 600
    assert counts.pop("dev") >= 150
    assert len(counts) >= 8
    assert set(counts.values()) == {40}
