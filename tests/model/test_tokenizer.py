"""Ids: XLM-R's numbering, cuts, and the tokenizer of a TorchScript file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_ENCODER, SST2, needs_small_encoder
from reference import needs_torchtext

from sst2_xlmr.model.tokenizer import Tokenizer, load_tokenizer
from sst2_xlmr.util.errors import UserError


def ids_of(tokenizer: Tokenizer, texts: list[str], pairs: list[str] | None = None) -> list[list[int]]:
    """Return the ids of every row."""
    ids, lengths = tokenizer.flat_ids(texts, pairs)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


@needs_small_encoder
def test_known_answer() -> None:
    tokenizer = load_tokenizer(SMALL_ENCODER / "sentencepiece.bpe.model", 256)
    assert ids_of(tokenizer, ["Hello World!"]) == [[0, 35378, 6661, 38, 2]]
    # As published in fairseq's examples/xlmr/README.md.
    published = {
        "Hello world!": [0, 35378, 8999, 38, 2],
        "你好，世界": [0, 6, 124084, 4, 3221, 2],  # noqa: RUF001
        "नमस्ते दुनिया": [0, 68700, 97883, 29405, 2],
        "مرحبا بالعالم": [0, 665, 193478, 258, 1705, 77796, 2],
        "Bonjour le monde": [0, 84602, 95, 11146, 2],
    }
    assert ids_of(tokenizer, list(published)) == list(published.values())


def test_unknown_characters_become_unk(tiny_encoder: Path) -> None:
    (ids,) = ids_of(load_tokenizer(tiny_encoder / "sentencepiece.bpe.model", 64), ["a 汉"])
    assert (ids[0], ids[-2:]) == (0, [3, 2])


def test_long_texts_are_cut_and_keep_their_end(tiny_encoder: Path) -> None:
    file = tiny_encoder / "sentencepiece.bpe.model"
    text = "a long story about a film " * 20
    (whole,) = ids_of(load_tokenizer(file, 10_000), [text])
    short = load_tokenizer(file, 12)
    assert ids_of(short, [text]) == [[*whole[:11], 2]]
    assert short.is_longer(text)
    exact = load_tokenizer(file, len(whole))
    assert ids_of(exact, [text]) == [whole]
    assert not exact.is_longer(text)


@needs_torchtext
@pytest.mark.parametrize("max_length", [5, 16, 64])
def test_the_tokenizer_of_a_torchscript_file_gives_the_same_ids(tiny_encoder: Path, max_length: int) -> None:
    from sst2_xlmr.export.torchscript import ScriptedTokenizer

    tokenizer = load_tokenizer(tiny_encoder / "sentencepiece.bpe.model", max_length)
    scripted = torch.jit.script(ScriptedTokenizer(tokenizer))
    texts = ["A fine film.", "", "  spaces   between  ", "Café 汉 \U0001f600", "word " * 50]
    assert scripted(texts, None) == ids_of(tokenizer, texts)
    assert scripted(texts, texts[::-1]) == ids_of(tokenizer, texts, texts[::-1])


@needs_torchtext
@needs_small_encoder
@pytest.mark.skipif(not SST2.is_dir(), reason=f"{SST2} is not there")
def test_both_tokenizers_agree_on_sst2() -> None:
    from sst2_xlmr.export.torchscript import ScriptedTokenizer

    tokenizer = load_tokenizer(SMALL_ENCODER / "sentencepiece.bpe.model", 256)
    splits = [(SST2 / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:] for split in ("train", "dev")]
    texts = [line.split("\t")[0] for lines in splits for line in lines]
    assert torch.jit.script(ScriptedTokenizer(tokenizer))(texts, None) == ids_of(tokenizer, texts)


PAIRS = [
    ("A fine film.", "It was good."),
    ("short", "a long story about a film that nobody will ever see again"),
    ("a long story about a film that nobody will ever see again", "short"),
    ("the same length as that", "the same length as that"),
    ("", "only a second"),
    ("only a first", ""),
    ("汉", "\U0001f600 café"),
]


@pytest.mark.parametrize("max_length", range(5, 30))
def test_pairs_are_joined_and_cut_as_transformers_does(tiny_encoder: Path, max_length: int) -> None:
    transformers = pytest.importorskip("transformers")
    file = tiny_encoder / "sentencepiece.bpe.model"
    reference, ours = transformers.XLMRobertaTokenizer.from_pretrained(tiny_encoder), load_tokenizer(file, max_length)
    texts, pairs = map(list, zip(*PAIRS))
    if not reference.is_fast:  # transformers 5 has fast tokenizers only, which cut pairs in another way
        expected = reference(texts, pairs, truncation="longest_first", max_length=max_length)["input_ids"]
        assert ids_of(ours, texts, pairs) == expected
    alone = ["A fine film.", "It did not hold me for a minute", "word " * 100]
    assert reference(alone, truncation=True, max_length=max_length)["input_ids"] == ids_of(ours, alone)
    whole = reference(texts, pairs)["input_ids"]
    assert [ours.is_longer(*pair) for pair in PAIRS] == [len(ids) > max_length for ids in whole]


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "x.model", 64)
    (tmp_path / "x.model").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="x.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model", 64)
