"""Token cache: made once, found by content, whole or not there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLE_DATA

from sst2_xlmr import token_cache
from sst2_xlmr.config import Config, UserError
from sst2_xlmr.data import read_rows
from sst2_xlmr.token_cache import TokenCache, tokenize_file
from sst2_xlmr.tokenizer import load_tokenizer


@pytest.fixture
def cache(tiny_encoder: Path, tmp_path: Path) -> TokenCache:
    tokenizer_file = tiny_encoder / "sentencepiece.bpe.model"
    return tokenize_file(SAMPLE_DATA / "train.tsv", tokenizer_file, Config(max_length=20), tmp_path / "cache")


def test_cache_equals_tokenizing_afresh(cache: TokenCache, tiny_encoder: Path) -> None:
    config = Config(max_length=20)
    tokenizer = load_tokenizer(tiny_encoder / "sentencepiece.bpe.model", 20)
    rows = list(read_rows(SAMPLE_DATA / "train.tsv", "sentence", "label", config.label_names))
    assert len(cache) == len(rows)
    for row, (text, label) in enumerate(rows):
        assert cache.ids[cache.offsets[row] : cache.offsets[row + 1]].tolist() == tokenizer([text])[0]
        assert cache.labels[row] == label
    assert cache.lengths().tolist() == [len(tokenizer([text])[0]) for text, _ in rows]
    assert cache.truncated == sum(tokenizer.is_longer(text) for text, _ in rows) > 0
    assert cache.distinct_ids.tolist() == sorted(set(cache.ids.tolist()))


def test_chunks_do_not_change_the_cache(
    cache: TokenCache, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(token_cache, "_CHUNK_CHARACTERS", 300)
    other = tokenize_file(
        SAMPLE_DATA / "train.tsv", tiny_encoder / "sentencepiece.bpe.model", Config(max_length=20), tmp_path / "other"
    )
    [folder], [other_folder] = (list((tmp_path / name).iterdir()) for name in ("cache", "other"))
    assert len(other) == len(cache) > 21
    for file in folder.iterdir():
        assert file.read_bytes() == (other_folder / file.name).read_bytes(), file.name


def test_second_start_does_not_tokenize(
    cache: TokenCache, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_write_cache", lambda *_: pytest.fail("tokenized again"))
    again = tokenize_file(
        SAMPLE_DATA / "train.tsv", tiny_encoder / "sentencepiece.bpe.model", Config(max_length=20), tmp_path / "cache"
    )
    np.testing.assert_array_equal(again.ids, cache.ids)


@pytest.mark.parametrize("change", ["content", "length", "labels"])
def test_whatever_changes_the_ids_makes_a_new_cache(tiny_encoder: Path, tmp_path: Path, change: str) -> None:
    file, tokenizer_file = tmp_path / "train.tsv", tiny_encoder / "sentencepiece.bpe.model"
    file.write_text("sentence\tlabel\na fine film about nothing at all\t1\n")
    config = Config(max_length=20)
    before = tokenize_file(file, tokenizer_file, config, tmp_path / "cache")
    if change == "content":
        file.write_text("sentence\tlabel\na poor film about nothing at all\t1\n")
    elif change == "length":
        config = dataclasses.replace(config, max_length=4)
    else:
        config = dataclasses.replace(config, label_names=["1", "0"])
    after = tokenize_file(file, tokenizer_file, config, tmp_path / "cache")
    assert (before.ids.tolist(), before.labels.tolist()) != (after.ids.tolist(), after.labels.tolist())


def test_damaged_cache_is_made_anew(cache: TokenCache, tiny_encoder: Path, tmp_path: Path) -> None:
    expected = cache.ids.tolist()
    [folder] = (tmp_path / "cache").iterdir()
    with (folder / "ids.bin").open("r+b") as file:
        file.truncate(100)
    again = tokenize_file(
        SAMPLE_DATA / "train.tsv", tiny_encoder / "sentencepiece.bpe.model", Config(max_length=20), tmp_path / "cache"
    )
    assert again.ids.tolist() == expected
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_bad_row_leaves_no_cache(tiny_encoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "train.tsv"
    file.write_text("sentence\tlabel\nfine\t1\nbad\t7\n")
    with pytest.raises(UserError, match="line 3"):
        tokenize_file(file, tiny_encoder / "sentencepiece.bpe.model", Config(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tiny_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="SST2_XLMR_CACHE"):
        tokenize_file(
            SAMPLE_DATA / "dev.tsv", tiny_encoder / "sentencepiece.bpe.model", Config(), tmp_path / "file" / "cache"
        )
