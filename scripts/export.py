"""Write a trained model in another form, and check that it gives the same answers.

    python scripts/export.py --model runs/NAME/model --format torchscript --output classifier.pt
    python scripts/export.py --model runs/NAME/best --format hf --dtype bf16 --output models/reviews

torchscript: one file that takes raw texts and needs torch and torchtext only (see sst2_xlmr/export/torchscript.py); to
be written under torch 2.3.1 with torchtext.
hf: a folder in Hugging Face layout, as train.py writes it, from any such folder. The result is read back and compared
with the model on a dozen sentences in as many languages, or those of --check-file, alone and in pairs. It gets its name
only if they agree.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

from sst2_xlmr import stack
from sst2_xlmr.cli import OneLineParser
from sst2_xlmr.config import EVAL_BATCH_TOKENS
from sst2_xlmr.errors import UserError, exit_on_user_error
from sst2_xlmr.evaluation.evaluate import predict
from sst2_xlmr.export.hugging_face import description_of, export_hugging_face
from sst2_xlmr.model.classifier import load_classifier
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.model.weights import load_tensors

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05}  # of a probability; bf16 weights have 8 significant bits
SENTENCES = [
    "A quiet film that stays with you for days.",
    "Das Essen war kalt, der Kellner unfreundlich und die Rechnung falsch.",
    "Un concert inoubliable !",
    "Очень скучная книга, я не дочитал её до конца.",
    "Πολύ καλή εξυπηρέτηση.",
    "الفندق نظيف والموقع ممتاز.",
    "המשלוח הגיע באיחור של שבועיים.",
    "यह फ़ोन दो दिन में ख़राब हो गया।",
    "อาหารอร่อยมากและราคาไม่แพง",
    "这家店的服务太差了,再也不来了。",
    "この本を読んで本当によかった。",
    "배터리가 하루도 못 가요.",
    "One word and another, " * 200,
    "  two  spaces, a\ttab, ﬁ and ① ",
    "",
]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description="Write a trained model in another form, and check it.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="model folder in Hugging Face layout")
    add("--format", required=True, choices=("hf", "torchscript"), help="what to write")
    add("--output", required=True, type=Path, metavar="PATH", help="the new folder (hf) or file (torchscript)")
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights in the folder; hf only [fp32]")
    add("--check-file", type=Path, metavar="FILE", help="compare on these texts, one per line [built-in sentences]")
    arguments = parser.parse_args(argv)
    if arguments.format == "torchscript" and arguments.dtype != "fp32":
        raise UserError("--dtype bf16 is for --format hf; a TorchScript file computes in fp32")
    if arguments.format == "torchscript" and not stack.has_torchtext():
        raise UserError(
            f"--format torchscript needs torchtext under torch 2.3.1, and this is {stack.description()}; export it in"
            " an environment that `STACK=torchtext scripts/setup.sh` has made"
        )
    if os.path.lexists(arguments.output):
        raise UserError(f"--output {arguments.output} is there already; choose another name")
    return arguments


def read_sentences(file: Path) -> list[str]:
    try:
        sentences = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --check-file {file} as UTF-8 text: {error}") from None
    if not sentences:
        raise UserError(f"--check-file {file} is empty")
    return sentences


def answers(folder: Path, sentences: list[str]) -> torch.Tensor:
    """Return fp32 [2 * sentences, labels], a model folder's probabilities for each sentence alone, then in pairs."""
    model, tokenizer, _ = load_classifier(folder, CPU, bf16=False)
    return predict(model, tokenizer(sentences) + tokenizer(sentences, sentences[::-1]), EVAL_BATCH_TOKENS, CPU)


def write_torchscript(source: Path, file: Path, sentences: list[str]) -> torch.Tensor:
    """Write the file; returns its probabilities, as `answers` does."""
    from sst2_xlmr.export.torchscript import save_torchscript  # only here: it needs torchtext

    model, tokenizer, label_names = load_classifier(source, CPU, bf16=False)
    save_torchscript(model, tokenizer, label_names, file)
    classify = torch.jit.load(file)
    alone, paired = classify(sentences), classify(sentences, sentences[::-1])
    labels, probabilities = alone[0] + paired[0], torch.cat([alone[1], paired[1]])
    if labels != [label_names[index] for index in probabilities.argmax(-1).tolist()]:
        raise UserError("the written file names other labels than its probabilities say; it was removed")
    return probabilities


def write_hugging_face(source: Path, folder: Path, dtype: str, sentences: list[str]) -> torch.Tensor:
    """Write the folder, with the source's model card if it has one; returns its `answers`."""
    encoder = find_encoder(str(source))
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in load_tensors(encoder).items()}
    export_hugging_face(folder, tensors, description_of(encoder))
    return answers(folder, sentences)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_args(argv)
    sentences = read_sentences(arguments.check_file) if arguments.check_file else SENTENCES
    expected = answers(arguments.model, sentences)
    output = arguments.output
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.") as scratch:
            written = Path(scratch, output.name)
            if arguments.format == "torchscript":
                probabilities = write_torchscript(arguments.model, written, sentences)
            else:
                probabilities = write_hugging_face(arguments.model, written, arguments.dtype, sentences)
            difference = float((probabilities - expected).abs().max())
            if not difference <= TOLERANCE[arguments.dtype]:  # also if it is NaN
                raise UserError(
                    f"the written model disagrees with {arguments.model}: a probability differs by"
                    f" {difference:.2g}; it was removed"
                )
            written.rename(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from None
    print(f"{output}: same answers on {len(sentences)} texts and pairs, probabilities within {difference:.1g}")


if __name__ == "__main__":
    exit_on_user_error(main)
