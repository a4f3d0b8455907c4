"""Token cache: made once, found by content, whole or not there; global batches of its rows, from any position on."""

import itertools
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, SAMPLE_DATA, SST2_NAMES, Patch, refusal, tokenize_sample

from sst2_xlmr.config import Config
from sst2_xlmr.data import rows as data
from sst2_xlmr.data import token_cache
from sst2_xlmr.data.batches import BatchLoader, MicroBatch, dropout_keys, rows_in_training_order, select_rows
from sst2_xlmr.data.rows import inspect, read_rows
from sst2_xlmr.data.sniff import ReadOptions
from sst2_xlmr.data.token_cache import TokenCache, cached_inspection, tokenize_files
from sst2_xlmr.model.tokenizer import CUT, LongTexts, Tokenizer
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.util.distributed import World

TASK = SingleLabel(SST2_NAMES)


@pytest.fixture(autouse=True)
def tokens(tmp_path: Path, monkeypatch: Patch) -> Path:
    """The folder of this test's token caches."""
    monkeypatch.setenv("SST2_XLMR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/tokens"


def test_tokenized_once_and_right(cache: TokenCache, tiny_encoder: Path, monkeypatch: Patch) -> None:
    tokenizer = Tokenizer(tiny_encoder / "sentencepiece.bpe.model", 20)
    texts, _, labels, *_ = zip(*read_rows(SAMPLE_DATA / "train.tsv", ReadOptions(), TASK))
    ids, lengths = tokenizer.flat_ids(list(texts))
    assert cache.labels.tolist() == list(labels)
    assert cache.lengths.tolist() == lengths.tolist()
    assert cache.starts.tolist() == [0, *np.cumsum(lengths)[:-1]]
    assert cache.ids.tolist() == ids.tolist()
    assert cache.is_cut.tolist() == list(map(tokenizer.is_longer, texts))
    assert cache.is_cut.any()
    assert cache.distinct_ids.tolist() == sorted(set(ids.tolist()))
    monkeypatch.setattr(token_cache, "_write_cache", lambda *_: pytest.fail("tokenized again"))
    assert tokenize_sample(tiny_encoder).ids.tolist() == ids.tolist()


def test_chunks_change_nothing(cache: TokenCache, tiny_encoder: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(token_cache, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(data, "_CHUNK_CHARACTERS", 300)
    monkeypatch.setenv("SST2_XLMR_CACHE", str(tmp_path / "other"))
    other = tokenize_sample(tiny_encoder)
    [folder], [other_folder] = (list((tmp_path / name / "tokens").iterdir()) for name in ("cache", "other"))
    assert len(other) == len(cache) > 21
    for file in folder.iterdir():
        assert file.read_bytes() == (other_folder / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    "change",
    [
        {},  # the tokenizer alone
        {"max_length": 4},
        {"max_length": 4, "long_texts": LongTexts("windows", 1)},
        {"task": SingleLabel(["1", "0"])},
        {"task": SingleLabel(SST2_NAMES, label_ids={"1": 0, "0": 1})},
        {"task": SingleLabel(SST2_NAMES, is_soft=True)},
        {"read_options": ReadOptions(text="other")},
        {"read_options": ReadOptions(pair="other")},
        {"read_options": ReadOptions(label="stars")},
        {"read_options": ReadOptions("1", label="3", header=False), "task": SingleLabel(["label", "1"])},
    ],
    ids=str,
)
def test_whatever_changes_the_ids_makes_a_new_cache(tiny_encoder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    file, tokenizer_file = tmp_path / "train.tsv", tmp_path / "sentencepiece.bpe.model"
    file.write_text("sentence\tother\tlabel\tstars\na fine film about nothing\ta plot\t1\t0\n")
    shutil.copy(tiny_encoder / "sentencepiece.bpe.model", tokenizer_file)

    def tokenized(max_length: int = 20, long_texts: LongTexts = CUT, **other: Any) -> TokenCache:
        how = tokenizer_file, max_length, long_texts
        return tokenize_files([file], how, **{"read_options": ReadOptions(), "task": TASK, **other})

    before = tokenized()
    if not change:  # the same size, one piece another
        tokenizer_file.write_bytes(tokenizer_file.read_bytes().replace("\u2581film".encode(), "\u2581mlif".encode()))
    after = tokenized(**change)
    assert (before.ids.tolist(), before.labels.tolist()) != (after.ids.tolist(), after.labels.tolist())
    file.write_text(file.read_text().replace("fine", "poor"))
    assert tokenized(**change).digest != after.digest


def test_a_file_is_inspected_once(tokens: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    file = tmp_path / "train.tsv"
    file.write_text("sentence\tlabel\tstars\nx\tgood\t1\ny\tbad\t2\n")

    def labels(**options: Any) -> dict[str, list[int]]:
        return cached_inspection(file, ReadOptions(**options)).labels

    assert labels() == {"good": [1, 2], "bad": [1, 3]}
    assert list(labels(label="stars")) == ["1", "2"]
    again = inspect(file, ReadOptions(label="stars"))
    monkeypatch.setattr(token_cache, "inspect", lambda *_: again)
    assert list(labels()) == ["good", "bad"]
    for damaged in tokens.glob("*/*.json"):
        damaged.write_text("{")
    assert list(labels()) == ["1", "2"]
    file.write_text("sentence\tlabel\nx\tgood\n")
    assert list(labels()) == ["1", "2"], "another content"


def test_several_files_are_one_and_a_part_is_as_if_alone(tiny_encoder: Path, tmp_path: Path) -> None:
    texts, files = ["a fine film", "poor " * 30, "so so", "a film"], [tmp_path / "a.tsv", tmp_path / "b.tsv"]
    for number, file in enumerate(files):
        file.write_text("text\tlabel\n" + "".join(f"{text} {number}\t{i % 2}\n" for i, text in enumerate(texts)))
    parameters = ((tiny_encoder / "sentencepiece.bpe.model", 20, CUT), ReadOptions(), TASK)
    both, second = tokenize_files(files, *parameters), tokenize_files(files[1:], *parameters)
    assert (len(both), both.files.tolist(), int(both.is_cut.sum())) == (8, [0] * 4 + [1] * 4, 2)
    part, rows = both.part(np.arange(4, 8)), np.array([3, 0, 2])
    ids, expected = (select_rows(cache.ids, cache.starts, cache.lengths, rows) for cache in (part, second))
    assert [each.tolist() for each in ids] == [each.tolist() for each in expected]
    for name in ("labels", "text_digests", "lines", "is_cut"):
        assert getattr(part, name).tolist() == getattr(second, name).tolist(), name
    assert part.is_cut.tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", ["ids.bin", "starts.npy", "labels.npy", "distinct_ids.npy", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted"])
def test_damaged_cache_is_made_anew(cache: TokenCache, tiny_encoder: Path, tokens: Path, name: str, how: str) -> None:
    expected = cache.ids.tolist()
    [folder] = tokens.iterdir()
    content = bytearray((folder / name).read_bytes())
    content[9] ^= 1
    (folder / name).unlink()  # the first cache has it mapped
    if how != "deleted":
        (folder / name).write_bytes(content if how == "flipped" else content[:-4])
    assert tokenize_sample(tiny_encoder).ids.tolist() == expected
    assert [entry.name for entry in tokens.iterdir()] == [folder.name]


def test_a_bad_row_leaves_no_cache_and_one_that_cannot_be_written_is_named(
    tiny_encoder: Path, tokens: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    file = tmp_path / "train.tsv"
    file.write_text("sentence\tlabel\nfine\t1\nbad\t7\n")
    how = tiny_encoder / "sentencepiece.bpe.model", 64, CUT
    assert "line 3" in refusal(tokenize_files, [file], how, ReadOptions(), TASK)
    assert list(tokens.iterdir()) == []
    monkeypatch.setenv("SST2_XLMR_CACHE", str(file / "cache"))
    assert "SST2_XLMR_CACHE" in refusal(tokenize_sample, tiny_encoder)


def test_a_file_that_changes_meanwhile_is_not_cached(tiny_encoder: Path, tokens: Path, monkeypatch: Patch) -> None:
    """What is found under a digest later is what has that digest."""
    digests = map(str, itertools.count())
    monkeypatch.setattr(token_cache, "source_digest", lambda _: next(digests))
    assert "train.tsv changed while it was being read" in refusal(tokenize_sample, tiny_encoder)
    line = refusal(cached_inspection, SAMPLE_DATA / "train.tsv", ReadOptions())
    assert "train.tsv changed while it was being read" in line
    assert list(tokens.iterdir()) == []


LENGTHS = np.random.RandomState(0).randint(3, 60, 1003)


def world_of(rank: int, world_size: int) -> World:
    return World(CPU, rank, world_size, rank, world_size)


def whole_order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The order as it is defined, made all at once."""
    random = np.random.RandomState([seed, epoch])
    order = random.permutation(len(lengths))
    group = batch_size * 100
    batches = []
    for start in range(0, len(order), group):
        rows = order[start : start + group]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (800, 4), (1003, 4), (1003, 1), (1003, 7), (1003, 2000)])
@pytest.mark.parametrize("first", [0, 1, 37, 250])
def test_order_is_the_defined_one_from_any_position_on(rows: int, batch_size: int, first: int) -> None:
    for seed, epoch in ((0, 0), (5, 3)):
        expected = whole_order(LENGTHS[:rows], batch_size, seed, epoch)[first:]
        found = list(rows_in_training_order(LENGTHS[:rows], batch_size, seed, epoch, first))
        assert [batch.tolist() for batch in found] == [batch.tolist() for batch in expected]


@pytest.mark.parametrize("micro_batch_size", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 20])
def test_ranks_share_every_global_batch(cache: TokenCache, world_size: int, micro_batch_size: int) -> None:
    """Row i of a batch belongs to rank i % W; all ranks have as many micro-batches, some perhaps without weight."""
    config = Config(batch_size=16, seed=5, micro_batch_size=micro_batch_size)
    worlds = [world_of(rank, world_size) for rank in range(world_size)]
    loaders = [BatchLoader(cache, config, world) for world in worlds]
    for rows in (np.arange(40, 56), np.arange(7, 8), np.array([9, 3, 5, 11, 2])):
        ranks = [loader.micro_batches(2, rows) for loader in loaders]
        size = micro_batch_size or 99
        assert {len(rank) for rank in ranks} == {-(-len(rows[::world_size]) // size)}, "no more than are needed"
        for number, rank in enumerate(ranks):
            real = [batch for batch in rank if batch.factor]
            mine = rows[number::world_size]
            assert all(batch.global_rows == len(rows) and len(batch.lengths) > 0 for batch in rank)
            assert all(len(batch.lengths) <= size for batch in rank)
            if len(mine):
                check_batches(real, cache, mine, 5, 2)
            else:
                assert not real


def check_batches(batches: list[MicroBatch], cache: TokenCache, rows: np.ndarray, seed: int, epoch: int) -> None:
    ids, lengths = select_rows(cache.ids, cache.starts, cache.lengths, rows)
    expected = (ids, lengths, torch.from_numpy(cache.labels[rows]), torch.from_numpy(dropout_keys(rows, seed, epoch)))
    for part, whole in zip(zip(*(batch[:4] for batch in batches)), expected):
        assert torch.cat(part).tolist() == whole.tolist()
    for batch in batches:
        assert len(batch.ids) == int(batch.lengths.sum())


def test_loader_goes_on_into_the_next_epoch(cache: TokenCache) -> None:
    config = Config(batch_size=30, micro_batch_size=8, seed=5)
    loader, batches_per_epoch = BatchLoader(cache, config, world_of(1, 2)), -(-len(cache) // 30)
    served = list(itertools.islice(loader.starting_at(0, batches_per_epoch - 2), 5))
    places = [(0, batches_per_epoch - 2), (0, batches_per_epoch - 1), (1, 0), (1, 1), (1, 2)]
    for batches, (epoch, batch) in zip(served, places):
        check_batches(batches, cache, next(loader.global_batches(epoch, batch))[1::2], 5, epoch)


def test_dropout_keys_belong_to_seed_epoch_and_row() -> None:
    """All different, the same whatever else is in the batch, and no warning of an overflow for any seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        places = itertools.product((0, 1, 2**32 - 1), (0, 9))
        keys = {(seed, epoch): dropout_keys(np.arange(1000), seed, epoch) for seed, epoch in places}
    assert len(np.unique(np.concatenate(list(keys.values())))) == 6000
    for (seed, epoch), found in keys.items():
        assert found.min() >= 0 and found.max() < 2**32
        some = np.array([700, 3, 41])
        np.testing.assert_array_equal(dropout_keys(some, seed, epoch), found[some])
