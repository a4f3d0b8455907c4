"""What is measured with: files of rows, a tokenizer, and encoders with random weights, all made on the spot.

Files have a header, and a sentence and a label in every line, separated by a tab, as SST-2's and those of sample_data.
"""

import io
import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from sst2_xlmr.export.folder import write_folder
from sst2_xlmr.model.encoders import EncoderFolder, EncoderShape
from sst2_xlmr.model.roberta import SequenceClassifier

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


def write_rows(file: Path, lines: Iterable[str]) -> None:
    with file.open("w", encoding="utf-8") as opened:
        opened.writelines(f"{line}\n" for line in itertools.chain([HEADER], lines))


def write_repeated_rows(source: Path, target: Path, count: int) -> None:
    """Write so many rows: those of another file, again and again."""
    write_rows(target, itertools.islice(itertools.cycle(read_rows(source)), count))


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


def write_encoder(folder: Path, tokenizer: Path, shape: tuple[int, int, int, int], vocab_size: int = 250_002) -> None:
    """Write a folder in Hugging Face layout with random weights, and FOLDER-model beside it, with a head for 0 and 1.

    The head's logits lie far apart, as those of a trained model, or int8 would compute nearly all texts again in bf16.
    """
    torch.manual_seed(0)
    sizes, model_folder = EncoderShape(vocab_size, *shape), folder.with_name(f"{folder.name}-model")
    model = SequenceClassifier(sizes, 2)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=20 if name == "head.out.weight" else 0.02)
    write_folder(model_folder, model.state_dict(), EncoderFolder("", sizes, Path(), tokenizer, ["0", "1"]))
    shutil.copytree(model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("roberta.")}
    save_file(encoder, folder / "model.safetensors", {"format": "pt"})
