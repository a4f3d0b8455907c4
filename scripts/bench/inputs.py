"""What is measured with: files of rows, a tokenizer, and encoders with random weights, all made on the spot.

Files have a header, and a sentence and a label in every line, separated by a tab, as SST-2's and those of sample_data.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLE_DATA = ROOT / "sample_data"
SHAPES = {  # hidden size, layers, heads, size of the feed-forward part
    "tiny": (32, 2, 2, 64),  # to try the programs
    "small": (384, 12, 12, 1536),
    "xlmr.base": (768, 12, 12, 3072),
    "xlmr.large": (1024, 24, 16, 4096),
}
HEADER = "sentence\tlabel"


def read_rows(file: Path) -> list[str]:
    """Return a file's lines, sentence and label, without its header."""
    return file.read_text(encoding="utf-8").splitlines()[1:]


def write_rows(file: Path, lines: list[str]) -> None:
    file.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")


def make_tokenizer(file: Path, pieces: int = 500) -> int:
    """Train a small SentencePiece model on the sample sentences; returns XLM-R's vocabulary size for it."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.split("\t")[0] for line in read_rows(SAMPLE_DATA / "train.tsv")),
        model_writer=trained,
        vocab_size=pieces,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file.write_bytes(trained.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()).GetPieceSize() + 2


def write_typical_rows(source: Path, target: Path, count: int) -> None:
    """Write so many rows of another file, spread evenly over their lengths in words."""
    lines = sorted(read_rows(source), key=lambda line: (len(line.split()), line))
    write_rows(target, [lines[int((number + 0.5) * len(lines) / count)] for number in range(count)])


def write_many_rows(source: Path, target: Path, count: int, seed: int) -> None:
    """Write `count` new rows of the same mean length: the beginning of one source's sentence and the end of another."""
    rows = [line.split("\t") for line in read_rows(source)]
    random = np.random.RandomState(seed)
    with target.open("w", encoding="utf-8") as file:
        file.write(f"{HEADER}\n")
        for _ in range(count):
            (text, label), (other, _) = (rows[row] for row in random.randint(len(rows), size=2))
            cut, first, second = random.random_sample(), text.split(), other.split()
            words = first[: round(cut * len(first))] + second[round(cut * len(second)) :]
            file.write(f"{' '.join(words or first)}\t{label}\n")


def random_weights(vocab_size: int, hidden: int, layers: int, ffn: int, positions: int) -> dict[str, torch.Tensor]:
    """Return the weights of an XLM-R encoder, fp32, under the names that transformers gives them."""
    linear = {"attention.self.query": (hidden, hidden), "attention.self.key": (hidden, hidden)}
    linear.update({"attention.self.value": (hidden, hidden), "attention.output.dense": (hidden, hidden)})
    linear.update({"intermediate.dense": (ffn, hidden), "output.dense": (hidden, ffn)})
    sizes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocab_size, hidden),
        "embeddings.position_embeddings.weight": (positions, hidden),
        "embeddings.token_type_embeddings.weight": (1, hidden),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{number}" for number in range(layers)):
        for name, size in linear.items():
            sizes.update({f"{layer}.{name}.weight": size, f"{layer}.{name}.bias": size[:1]})
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    torch.manual_seed(0)
    weights = {f"roberta.{name}": torch.randn(size) * 0.02 for name, size in sizes.items()}
    for name in norms:
        weights.update({f"roberta.{name}.weight": torch.ones(hidden), f"roberta.{name}.bias": torch.zeros(hidden)})
    return weights


def write_encoder(folder: Path, tokenizer: Path, shape: tuple[int, int, int, int], vocab_size: int = 250_002) -> None:
    """Write a folder in Hugging Face layout with random weights, and FOLDER-model beside it, with a head for 0 and 1.

    The head's logits lie far apart, as those of a trained model, or int8 would compute nearly all texts again in bf16.
    """
    hidden, layers, heads, ffn = shape
    weights = random_weights(vocab_size, hidden, layers, ffn, positions=514)
    head = {**weights, "classifier.dense.weight": torch.randn(hidden, hidden) * 0.02}
    head.update({"classifier.dense.bias": torch.zeros(hidden), "classifier.out_proj.bias": torch.zeros(2)})
    head["classifier.out_proj.weight"] = torch.randn(2, hidden) * 20
    settings = {"model_type": "xlm-roberta", "vocab_size": vocab_size, "hidden_size": hidden, "layer_norm_eps": 1e-5}
    settings.update(num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn, type_vocab_size=1)
    settings.update(max_position_embeddings=514, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    settings.update(id2label={"0": "0", "1": "1"}, label2id={"0": 0, "1": 1})
    model = folder.with_name(f"{folder.name}-model")
    for target, tensors, name in ((folder, weights, "Model"), (model, head, "ForSequenceClassification")):
        target.mkdir(parents=True)
        config = {**settings, "architectures": [f"XLMRoberta{name}"]}
        (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
        shutil.copyfile(tokenizer, target / "sentencepiece.bpe.model")
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
