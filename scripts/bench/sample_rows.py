"""A tokenizer and files of rows that are made on the spot, from the repository's sample sentences."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import sentencepiece

SAMPLE_DATA = Path(__file__).resolve().parent.parent.parent / "sample_data"


def sample_lines(split: str) -> list[str]:
    """Return the lines of a sample file, sentence and label, without its header."""
    return (SAMPLE_DATA / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]


def make_tokenizer(file: Path, pieces: int = 500) -> int:
    """Train a small SentencePiece model on the sample sentences; returns XLM-R's vocabulary size for it."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.split("\t")[0] for line in sample_lines("train")),
        model_writer=trained,
        vocab_size=pieces,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file.write_bytes(trained.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()).GetPieceSize() + 2


def write_rows(folder: Path, rows: int) -> None:
    """Write a data folder whose training file has so many rows: the sample sentences over and over.

    They are whole, halves and thirds, so that the rows have about as many tokens as SST-2's, whose training rows are
    mostly parts of sentences.
    """
    folder.mkdir()
    for split, count in (("train", rows), ("dev", len(sample_lines("dev")))):
        lines = ["sentence\tlabel"]
        for number, line in enumerate(itertools.islice(itertools.cycle(sample_lines(split)), count)):
            text, label = line.split("\t")
            words = text.split()
            lines.append(f"{' '.join(words[: -(-len(words) // (1 + number % 3))])}\t{label}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
