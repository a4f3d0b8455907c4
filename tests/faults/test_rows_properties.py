"""Properties of whatever rows there may be: written and read they are the same; an epoch has each exactly once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from conftest import find_label_names
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sst2_xlmr.config import Config
from sst2_xlmr.data.batches import BatchLoader
from sst2_xlmr.data.formats import kind_of, row_writer
from sst2_xlmr.data.rows import read_rows
from sst2_xlmr.data.sniff import Columns
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.files import new_file

quick = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
ENDINGS = st.sampled_from([".tsv", ".csv", ".jsonl", ".tsv.gz", ".csv.gz", ".jsonl.gz"])
ASKED = {".tsv": "none"}  # as we write it; a text may look like CSV's quotes
NAMES = ["bad", 'so, "so"', "good", "1 star"]
# All that UTF-8 has, but NUL, which is no text.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
filled = texts.filter(str.strip)


def write(path: Path, names: list[str], rows: list[list[str]]) -> None:
    with new_file(path) as file:
        add = row_writer(file, kind_of(path))
        for row in rows if kind_of(path) == ".jsonl" else [names, *rows]:
            add(names, row)


def as_tsv_has_it(text: str) -> str:
    for characters in ("\r\n", "\r", "\n", "\t"):
        text = text.replace(characters, " ")
    return text


@quick
@given(ending=ENDINGS, rows=st.lists(st.tuples(filled, filled, st.integers(0, 3)), min_size=1, max_size=12))
def test_rows_come_back_as_they_were_written(ending: str, rows: list[tuple[str, str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a" + ending)
        columns = Columns("one", "two", quoting=ASKED.get(kind_of(path)), header=True)
        write(path, ["label", "one", "two"], [[NAMES[label], text, pair] for text, pair, label in rows])
        found = [row[:3] for row in read_rows(path, columns, SingleLabel(NAMES))]
        seen = sorted({NAMES[label] for _, _, label in rows})
        if len(seen) > 1:
            assert find_label_names(path, columns) == seen
    if kind_of(path) == ".tsv":
        rows = [(as_tsv_has_it(text), as_tsv_has_it(pair), label) for text, pair, label in rows]
    assert found == rows


@quick
@given(ending=ENDINGS, rows=st.lists(st.lists(texts | st.just(""), min_size=2, max_size=2), min_size=1, max_size=12))
def test_rows_for_prediction_keep_all_cells(ending: str, rows: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a" + ending)
        write(path, ["text", "other"], rows)
        columns = Columns(quoting=ASKED.get(kind_of(path)), header=True)
        found = [list(row.fields.cells) for row in read_rows(path, columns, None)]
    if kind_of(path) == ".tsv":
        rows = [[as_tsv_has_it(cell) for cell in row] for row in rows]
    assert found == rows


epochs = {
    "rows": st.integers(1, 700),
    "batch_size": st.integers(1, 40),
    "world_size": st.integers(1, 9),
    "seed": st.integers(0, 2**31 - 1),
    "epoch": st.integers(0, 100),
}


@quick
@given(**epochs, micro_batch_size=st.integers(0, 9), part=st.floats(0, 1))
def test_an_epoch_has_every_row_exactly_once_from_any_position_for_any_number_of_processes(
    rows: int, batch_size: int, world_size: int, seed: int, epoch: int, micro_batch_size: int, part: float
) -> None:
    lengths, numbers = np.random.RandomState(seed).randint(3, 60, rows), np.arange(rows, dtype=np.int32)
    cache = TokenCache(numbers, np.arange(rows + 1), numbers)  # the only id of a row is its number
    config = Config(batch_size=batch_size, seed=seed, micro_batch_size=micro_batch_size)
    worlds = [World(rank, world_size, rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    loaders = [BatchLoader(cache, lengths, None, config, world) for world in worlds]
    whole = [batch.tolist() for batch in loaders[0].global_batches(epoch, 0)]
    assert sorted(row for batch in whole for row in batch) == list(range(rows))
    assert len(whole) == len(loaders[0])
    assert sorted(map(len, whole))[1:] == [batch_size] * (len(whole) - 1)
    position = round(part * len(whole))
    rest = list(loaders[0].global_batches(epoch, position))
    assert [batch.tolist() for batch in rest] == whole[position:]
    for global_rows in rest:
        parts = [loader[epoch, global_rows] for loader in loaders]
        assert len({len(batches) for batches in parts}) == 1, "all keep step"
        real = [batch for batches in parts for batch in batches if batch.weight]
        assert sorted(torch.cat([batch.ids for batch in real]).tolist()) == sorted(global_rows.tolist())
        assert {batch.global_rows for batches in parts for batch in batches} == {len(global_rows)}
