"""Properties of whatever rows there may be: written and read they are the same; an epoch has each exactly once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sst2_xlmr.data.batches import GlobalBatchSampler
from sst2_xlmr.data.formats import kind_of, row_writer
from sst2_xlmr.data.rows import Columns, Row, find_label_names, read_examples, read_rows
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
        found = list(read_rows(path, Columns("one", "two"), NAMES))
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


def world_of(rank: int, world_size: int) -> World:
    return World(rank, world_size, rank, world_size, torch.device("cpu"))


@quick
@given(**epochs)
def test_an_epoch_has_every_row_exactly_once(
    rows: int, batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    lengths = np.random.RandomState(seed).randint(3, 60, rows)
    ranks = [GlobalBatchSampler(lengths, batch_size, seed, world_of(rank, world_size)) for rank in range(world_size)]
    for rank in ranks:
        rank.load_state_dict({"epoch": epoch, "batch": 0})
    seen: list[int] = []
    sizes: list[int] = []
    for parts in zip(*ranks):
        real = [row for part in parts if part.weight for row in part.rows.tolist()]
        assert {part.global_rows for part in parts} == {len(real)}
        assert {part.most_rows for part in parts} == {max(len(part.rows) for part in parts)}
        assert all(len(part.rows) > 0 for part in parts)
        seen += real
        sizes.append(len(real))
    assert sorted(seen) == list(range(rows))
    assert len(sizes) == len(ranks[0])
    assert sorted(sizes)[1:] == [batch_size] * (len(sizes) - 1)


@quick
@given(**epochs, part=st.floats(0, 1))
def test_a_position_has_exactly_the_rest_of_its_epoch_for_any_number_of_processes(
    rows: int, batch_size: int, world_size: int, seed: int, epoch: int, part: float
) -> None:
    lengths = np.random.RandomState(seed).randint(3, 60, rows)
    alone = GlobalBatchSampler(lengths, batch_size, seed, world_of(0, 1))
    alone.load_state_dict({"epoch": epoch, "batch": 0})
    whole = [sorted(wanted.rows.tolist()) for wanted in alone]
    position = {"epoch": epoch, "batch": round(part * len(alone))}
    ranks = [GlobalBatchSampler(lengths, batch_size, seed, world_of(rank, world_size)) for rank in range(world_size)]
    for rank in ranks:
        rank.load_state_dict(position)
    rest = [sorted(row for one in parts if one.weight for row in one.rows.tolist()) for parts in zip(*ranks)]
    assert rest == whole[position["batch"] :]
