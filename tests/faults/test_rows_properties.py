"""Properties of whatever rows there may be: written and read they are the same; an epoch has each exactly once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sst2_xlmr.config import Config
from sst2_xlmr.data.batches import GlobalBatchSampler, RankBatches
from sst2_xlmr.data.formats import kind_of, row_writer
from sst2_xlmr.data.rows import Columns, Row, find_label_names, read_examples, read_rows
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.files import new_file

quick = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
ENDINGS = st.sampled_from([".tsv", ".csv", ".jsonl", ".tsv.gz", ".csv.gz", ".jsonl.gz"])
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
        write(path, ["label", "one", "two"], [[NAMES[label], text, pair] for text, pair, label in rows])
        found = list(read_rows(path, Columns("one", "two"), SingleLabel(NAMES)))
        seen = sorted({NAMES[label] for _, _, label in rows})
        if len(seen) > 1:
            assert find_label_names(path, Columns()) == seen
    expected = [Row(*row) for row in rows]
    if kind_of(path) == ".tsv":
        expected = [Row(as_tsv_has_it(row.text), as_tsv_has_it(row.pair or ""), row.label) for row in expected]
    assert found == expected


@quick
@given(ending=ENDINGS, rows=st.lists(st.lists(texts | st.just(""), min_size=2, max_size=2), min_size=1, max_size=12))
def test_rows_for_prediction_keep_all_cells(ending: str, rows: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a" + ending)
        write(path, ["text", "other"], rows)
        found = [list(example.fields.cells) for example in read_examples(path, Columns())]
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


def rank_batches(lengths: np.ndarray, world_size: int, rank: int, micro_batch_size: int) -> RankBatches:
    """Rows whose only id is their number."""
    rows = np.arange(len(lengths), dtype=np.int32)
    cache = TokenCache(rows, np.arange(len(rows) + 1), rows)
    world = World(rank, world_size, rank, world_size, torch.device("cpu"))
    return RankBatches(cache, Config(micro_batch_size=micro_batch_size), world)


@quick
@given(**epochs, micro_batch_size=st.integers(0, 9), part=st.floats(0, 1))
def test_an_epoch_has_every_row_exactly_once_from_any_position_for_any_number_of_processes(
    rows: int, batch_size: int, world_size: int, seed: int, epoch: int, micro_batch_size: int, part: float
) -> None:
    lengths = np.random.RandomState(seed).randint(3, 60, rows)
    sampler = GlobalBatchSampler(lengths, batch_size, seed)
    sampler.load_state_dict({"epoch": epoch, "batch": 0})
    whole = [batch.tolist() for _, batch in sampler]
    assert sorted(row for batch in whole for row in batch) == list(range(rows))
    assert len(whole) == len(sampler)
    assert sorted(map(len, whole))[1:] == [batch_size] * (len(whole) - 1)
    position = round(part * len(whole))
    sampler.load_state_dict({"epoch": epoch, "batch": position})
    rest = list(sampler)
    assert [batch.tolist() for _, batch in rest] == whole[position:]
    ranks = [rank_batches(lengths, world_size, rank, micro_batch_size) for rank in range(world_size)]
    for item in rest:
        parts = [rank.__getitems__(item) for rank in ranks]
        assert len({len(batches) for batches in parts}) == 1, "all keep step"
        real = [batch for batches in parts for batch in batches if batch.weight]
        assert sorted(torch.cat([batch.ids for batch in real]).tolist()) == sorted(item[1].tolist())
        assert {batch.global_rows for batches in parts for batch in batches} == {len(item[1])}
