"""Classify sentences with a trained model.

    python scripts/predict.py --model runs/NAME/model "A fine film." "Not my cup of tea."
    python scripts/predict.py --model runs/NAME/model < sentences.txt

Prints a line a sentence, in order: label, tab, its probability, tab, the sentence.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from sst2_xlmr.arguments import OneLineParser
from sst2_xlmr.config import UserError, exit_on_user_error
from sst2_xlmr.distributed import choose_device, choose_precision
from sst2_xlmr.evaluate import predict
from sst2_xlmr.memory import keep_freed_memory
from sst2_xlmr.model import load_classifier

SENTENCES_AT_ONCE = 1024


def read_sentences(arguments: list[str]) -> Iterator[str]:
    """Yield the arguments, or without any the lines of standard input (UTF-8, LF or CRLF)."""
    if arguments:
        yield from arguments
        return
    if sys.stdin.isatty():
        raise UserError("no sentences: give them as arguments, or one a line on standard input")
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UserError(f"standard input, line {number}: not UTF-8; convert it, e.g. with iconv") from None


def main() -> None:
    parser = OneLineParser(description="Classify sentences: label, probability and sentence on a line each.")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder that train.py wrote")
    parser.add_argument("--batch-size", type=int, default=64, metavar="ROWS", help="sentences per forward pass [64]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="[auto]")
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="default: the lines of standard input")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more, not {arguments.batch_size}")
    keep_freed_memory()
    device = choose_device(arguments.device, 0)
    bf16 = choose_precision(arguments.precision, device) == "bf16"
    model, tokenizer, label_names = load_classifier(arguments.model, device, bf16)
    sentences = read_sentences(arguments.sentences)
    while chunk := list(itertools.islice(sentences, SENTENCES_AT_ONCE)):
        probabilities = predict(model, tokenizer(chunk), arguments.batch_size, device)
        for sentence, row in zip(chunk, probabilities):
            best = int(row.argmax())
            # Tabs and line ends inside a sentence would break the three columns.
            print(f"{label_names[best]}\t{row[best]:.4f}\t{' '.join(sentence.splitlines()).replace(chr(9), ' ')}")
        sys.stdout.flush()


if __name__ == "__main__":
    try:
        exit_on_user_error(main)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
