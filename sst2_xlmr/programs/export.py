"""Write a trained model in another form, of those in docs/export.md, and check that its predictions are the same.

The result is read back and compared with the model on sentences in a dozen languages, or on --check-file. It gets its
name only if both agree, or in int8 if no more labels change and no more accuracy is lost than the bounds allow.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from sst2_xlmr.config import EVAL_BATCH_TOKENS, flag, named_file, named_files
from sst2_xlmr.data.formats import KINDS, or_list
from sst2_xlmr.data.rows import ReadOptions, Row, has_labels, read_options_for, read_rows
from sst2_xlmr.evaluation.compare import check_comparison, compare_files
from sst2_xlmr.evaluation.evaluate import predict
from sst2_xlmr.export.folder import read_card, write_all_but_weights, write_folder
from sst2_xlmr.export.trimmed import write_trimmed
from sst2_xlmr.model.classifier import load_classifier, load_tensors, task_of
from sst2_xlmr.model.encoders import EncoderFolder, find_encoder, find_model
from sst2_xlmr.model.roberta import PAD_ID
from sst2_xlmr.model.tokenizer import Tokenizer
from sst2_xlmr.model.tokenizer_files import added_tokens
from sst2_xlmr.programs import options
from sst2_xlmr.report.tables import comparison_table
from sst2_xlmr.task import Task
from sst2_xlmr.util import versions
from sst2_xlmr.util.errors import UserError, refuse, say
from sst2_xlmr.util.files import put_in_place, scratch_folder, write_errors

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "onnx": 1e-4}  # for a probability; bf16 weights have 8 significant bits
ROWS_COMPARED = 1000  # of --keep-vocabulary-of: their predictions are compared, and the tokens of all rows
ONNX_BATCH = 32
SENTENCES = [  # to compare on without --check-file
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
# ((texts, second texts or None), labels, int [rows], or None)
Rows = tuple[tuple[list[str], list[str] | None], np.ndarray | None]
# Takes texts, and their second texts or None; returns fp32 probabilities [rows, outputs].
Classify = Callable[[list[str], list[str] | None], np.ndarray]


def is_rows_file(file: Path) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(KINDS)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    arguments = options.parse("export", argv)
    kind, from_ids, trims = arguments.export_format, arguments.from_ids, arguments.keep_vocabulary_of
    is_onnx, is_folder, is_int8 = kind.startswith("onnx"), "hf" in kind, kind.endswith("int8")
    needs_rows = f"--format {kind} needs --check-file: rows on which to measure what 8 bits cost"
    needed = ("onnx", "onnxruntime", "onnxruntime_extensions")[: 3 - is_folder] if is_onnx else ()
    missing = " and ".join(package for package in needed if find_spec(package) is None)
    no_torchtext = kind == "torchscript" and not versions.has_torchtext()
    here = f"and this is {versions.versions()}; export it in an environment of `STACK=torchtext scripts/setup.sh`"
    files = [*(named_file(file)[1] for file in arguments.check_file), *map(Path, trims)]
    has_rows, rows = any(map(is_rows_file, files)), f"a {or_list(KINDS)} file in --check-file or --keep-vocabulary-of"
    columns = ", ".join(flag(name) for name in options.TABLE_OPTIONS if name in arguments)
    has_pairs = getattr(arguments, "text_pair_column", None) and is_onnx and not is_folder and not from_ids
    alone = "--from-ids with --keep-vocabulary-of would leave no tokenizer that gives these ids"
    refuse(
        (kind != "hf" and arguments.dtype != "fp32", "--dtype bf16 is for --format hf"),
        (no_torchtext, f"--format torchscript needs torchtext under torch 2.3.1, {here}"),
        (missing, f"--format {kind} needs {missing}; install it with pip install -e '.[onnx]'"),
        (from_ids and (is_folder or not is_onnx), "--from-ids is for --format onnx and onnx-int8"),
        (from_ids and trims, f"{alone}; export --format hf trimmed, then that folder with --from-ids"),
        (is_int8 and not arguments.check_file, needs_rows),
        (columns and not has_rows, f"{columns} needs {rows}, whose columns it names"),
        (has_pairs, "an ONNX file that takes texts takes one for each row; export pairs with --from-ids"),
    )
    options.check_output("--output", arguments.output, makes_parents=True)
    return arguments


def read_texts(file: Path, read_options: ReadOptions, task: Task | None = None) -> Iterator[Row]:
    """Yield a file's rows, with labels if there is a task; a file of an unknown kind has one text per line."""
    return read_rows(file, read_options if is_rows_file(file) else ReadOptions(format="lines"), task)


def read_checks(
    check_files: list[str], read_options: ReadOptions, task: Task, takes_pairs: bool, has_label_column: bool
) -> dict[str, Rows]:
    """Return name -> rows of --check-file, which must have labels if `has_label_column`; by default, the sentences."""
    if not check_files:
        pairs = {"pairs": ((SENTENCES, SENTENCES[::-1]), None)} if takes_pairs else {}
        return {"sentences": ((SENTENCES, None), None), **pairs}
    checks: dict[str, Rows] = {}
    for name, file in named_files(check_files, "--check-file").items():
        is_labelled = is_rows_file(file) and (has_label_column or has_labels(file, read_options))
        rows = list(read_texts(file, read_options, task if is_labelled else None))
        seconds = [row.pair for row in rows if row.pair is not None]
        labels = np.array([row.label for row in rows]) if is_labelled else None
        checks[name] = ([row.text for row in rows], seconds or None), labels
    return checks


def classify_with_folder(folder: Path) -> Classify:
    """Return a folder's classifier; UserError if any weight is not finite."""
    model, tokenizer, task = load_classifier(folder, CPU, bf16=False)
    return lambda texts, pairs: predict(model, task, *tokenizer.flat_ids(texts, pairs), EVAL_BATCH_TOKENS, CPU)


def write_torchscript(encoder: EncoderFolder, file: Path) -> Classify:
    from sst2_xlmr.export.torchscript import save_torchscript  # only here: it needs torchtext

    model, tokenizer, task = load_classifier(Path(encoder.name), CPU, bf16=False)
    save_torchscript(model, tokenizer, task, file)
    classify = torch.jit.load(file)
    return lambda texts, pairs: checked(task, classify(texts, pairs))


def write_onnx_file(encoder: EncoderFolder, file: Path, int8: bool, takes_texts: bool, logits_only: bool) -> Classify:
    import onnxruntime

    from sst2_xlmr.export.onnx import write_onnx  # only here: it needs onnx

    task, weights = task_of(encoder), {name: tensor.numpy() for name, tensor in load_tensors(encoder).items()}
    write_onnx(file, weights, encoder, task, takes_texts, int8, logits_only)
    options = onnxruntime.SessionOptions()
    if takes_texts:
        import onnxruntime_extensions

        options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer(encoder.tokenizer_file, encoder.max_length, encoder.long_texts)

    def probabilities(texts: list[str], pairs: list[str] | None) -> np.ndarray:
        found = []
        for start in range(0, len(texts), ONNX_BATCH):
            batch = slice(start, start + ONNX_BATCH)
            inputs = {"text": np.array(texts[batch], dtype=object)}
            if not takes_texts:
                ids, lengths = tokenizer.flat_ids(texts[batch], pairs and pairs[batch])
                rows = torch.from_numpy(ids).long().split(lengths.tolist())
                padded = pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
                inputs = {"input_ids": padded.numpy(), "attention_mask": padded.ne(PAD_ID).long().numpy()}
            outputs = session.run(None, inputs)
            logits = torch.from_numpy(outputs[0]) if logits_only else None
            found.append(checked(task, outputs) if logits is None else task.probabilities(logits).numpy())
        return np.concatenate(found)

    return probabilities


def checked(task: Task, outputs: Any) -> np.ndarray:
    """Return the probabilities among a written file's outputs; UserError if its labels do not follow from them."""
    labels, probabilities = task.parse_exported_outputs(outputs if isinstance(outputs, (tuple, list)) else (outputs,))
    if labels != [task.prediction_cells(row, all_probabilities=False)[0] for row in probabilities.tolist()]:
        raise UserError("the written file's labels do not follow from its probabilities; it was removed")
    return probabilities


def write_hugging_face(encoder: EncoderFolder, folder: Path, dtype: str, card: str) -> Classify:
    weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in load_tensors(encoder).items()}
    write_folder(folder, weights, encoder, card)
    return classify_with_folder(folder)


def trim(encoder: EncoderFolder, files: list[str], read_options: ReadOptions, folder: Path) -> EncoderFolder:
    """Write a model folder with the vocabulary of some files, and check that these get bitwise equal predictions."""
    rows = [row for file in files for row in read_texts(Path(file), read_options)]
    texts = [text for row in rows for text in (row.text, row.pair) if text is not None]
    left = write_trimmed(encoder, texts, folder)
    trimmed = find_encoder(str(folder))
    both = [Tokenizer(model.tokenizer_file, encoder.max_length) for model in (encoder, trimmed)]
    for text in texts:
        before, after = (tokenizer.pieces_of(tokenizer.flat_ids([text])[0].tolist()) for tokenizer in both)
        if before != after:
            raise UserError(f"the trimmed tokenizer splits {text[:80]!r} differently; it was removed")
    expected, found = (classify_with_folder(each)(texts[:ROWS_COMPARED], None) for each in (Path(encoder.name), folder))
    if not np.array_equal(expected, found):
        raise UserError("the trimmed model gives other answers; it was removed")
    kept = f"{left:,} of {encoder.shape.vocab_size:,} embedding rows"
    say(f"kept {kept}: {len(texts):,} texts are split into the same pieces, so they get the same answers")
    return trimmed


def write(arguments: argparse.Namespace, encoder: EncoderFolder, task: Task, written: Path) -> str:
    """Write the model's new form, and check its predictions against the model's; returns the result in words."""
    int8, kind = arguments.export_format.endswith("int8"), arguments.export_format.removesuffix("-int8")
    takes_texts = kind == "torchscript" or (kind == "onnx" and not arguments.from_ids)
    takes_pairs = kind != "onnx" or arguments.from_ids
    if takes_texts and added_tokens(encoder.tokenizer_file):
        fix = "use hf, onnx-hf, or onnx with --from-ids"
        raise UserError(f"--format {kind} has only SentencePiece, but tokens were added to this model's; {fix}")
    if encoder.long_texts.kind == "windows" and kind != "hf" and (kind != "onnx" or not takes_texts):
        what = "averages the windows of a long text, which this form cannot"
        raise UserError(f"--format {arguments.export_format}: the model {what}; take hf, or onnx without --from-ids")
    read_options = replace(read_options_for(arguments), classes=tuple(task.label_names))
    checks = read_checks(arguments.check_file, read_options, task, takes_pairs, "label_column" in arguments)
    unlabelled = [name for name, (_, labels) in checks.items() if labels is None] if int8 else []
    expected, card = classify_with_folder(Path(encoder.name)), read_card(encoder.weights_file.parent)
    if kind == "torchscript":
        found = write_torchscript(encoder, written)
    elif kind.startswith("onnx"):
        file = written
        if kind == "onnx-hf":
            write_all_but_weights(written, encoder, card)
            file = written / "onnx" / ("model_quantized.onnx" if int8 else "model.onnx")
            file.parent.mkdir()
        found = write_onnx_file(encoder, file, int8, takes_texts, kind == "onnx-hf")
    else:
        found = write_hugging_face(encoder, written, arguments.dtype, card)
    both = {name: (found(*sides), expected(*sides), labels) for name, (sides, labels) in checks.items()}
    compared = compare_files(task, both)
    *_, total = compared.values()
    rows, difference = f"{total['rows']:,} rows", total["largest"]
    if int8:
        lines = [f"no labels in {name}: accuracy was not compared" for name in unlabelled]
        say("\n".join([*comparison_table(task, compared, "int8", "fp32"), *lines]))
        check_comparison(task, compared, arguments.most_changed / 100, arguments.most_lost / 100, "int8", "fp32")
        return f"int8 within the bounds on {rows}"
    if not difference <= TOLERANCE["onnx" if kind.startswith("onnx") else arguments.dtype]:  # also if it is NaN
        what = f"a probability differs by {difference:.2g}; it was removed"
        raise UserError(f"the written model disagrees with {arguments.model}: {what}")
    return f"same answers on {rows}, probabilities within {difference:.1g}"


def main(argv: list[str] | None = None) -> None:
    arguments = parse_args(argv)
    encoder = find_model(arguments.model)
    output = arguments.output.absolute()
    with write_errors(arguments.output), scratch_folder(output) as scratch:
        if arguments.keep_vocabulary_of:
            encoder = trim(encoder, arguments.keep_vocabulary_of, read_options_for(arguments), scratch / "trimmed")
        summary = write(arguments, encoder, task_of(encoder), scratch / "written")
        put_in_place(scratch / "written", output, replaces=False)
    say(f"{arguments.output}: {summary}")
