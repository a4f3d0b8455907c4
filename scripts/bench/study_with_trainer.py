"""Compare settings over several seeds with transformers' Trainer, which learns the same rows with the common options.

    python scripts/bench/study_with_trainer.py --peer ../peer/bin/python --seeds 1,2,3 --output-dir runs/study \\
        --encoder models/small --batch-size 32 --lr 5e-5 --epochs 1 --setting plain "" --setting longer "--epochs 3"

--peer is the Python of an environment with current torch, transformers and accelerate: `python -m venv ../peer`, then
`../peer/bin/pip install "transformers[torch]"`. All else is as in `sst2-xlmr study`. The Trainer groups rows by length,
takes the seeds of the others, and stands first in the table, so that differences are to it. Its predictions are in the
files trainer/seed-N.json, and scored like ours; what is finished is skipped.
"""

import argparse
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sst2_xlmr.cli import OneLineParser, parse_args
from sst2_xlmr.config import Config, flag
from sst2_xlmr.data.batches import select_rows
from sst2_xlmr.data.prepare import prepare
from sst2_xlmr.programs import study, study_runs
from sst2_xlmr.report.tables import Figures
from sst2_xlmr.task import Task, main_metric
from sst2_xlmr.util.device import choose_device, choose_precision
from sst2_xlmr.util.errors import UserError, exit_on_user_error
from sst2_xlmr.util.files import write_text

PEER_PROGRAM = Path(__file__).with_name("peer.py")
TRAINER = "trainer"
_LACKS = "max_steps schedule layerwise_lr_decay label_smoothing class_weights freeze_encoder early_stopping_patience"
_SAME = ("batch_size", "epochs", "lr", "warmup_ratio", "weight_decay", "max_grad_norm", "dropout", "head_dropout")


def peer_python(name: str) -> str:
    """Check an environment's Python, for argparse's `type`."""
    if not shutil.which(name):
        raise argparse.ArgumentTypeError(f"{name} is not a program; give an environment's bin/python")
    return name


def write_peer_inputs(words: list[str], folder: Path) -> tuple[dict[str, Any], Task]:
    """Write the rows of all files, as ids, into a folder; returns an order for peer.py, without a seed, and the task.

    UserError if the Trainer cannot do what `words`, options of train.py, ask for.
    """
    config, _ = parse_args([*words, "--output-dir", str(folder / "unused")])
    inputs = prepare(config)
    config = inputs.config
    if not Path(config.encoder).is_dir():
        raise UserError(f"--peer needs an encoder in a folder that transformers opens, not {config.encoder}")
    for name in _LACKS.split():
        if getattr(config, name) != getattr(Config(), name):
            raise UserError(f"--peer: the Trainer does not have {flag(name)}; put it into a --setting")
    if inputs.all_training_rows.weights is not None or getattr(inputs.task, "is_soft", False):
        raise UserError("--peer: the Trainer has neither soft labels nor row weights; leave them out of the files")
    arrays: dict[str, np.ndarray] = {}
    for split, cache in inputs.caches.items():
        ids, _ = select_rows(cache.ids, cache.starts, cache.lengths, np.arange(len(cache)))
        arrays[f"{split}_ids"], arrays[f"{split}_labels"] = ids.numpy(), cache.labels
        arrays[f"{split}_offsets"] = np.concatenate([[0], np.cumsum(cache.lengths, dtype=np.int64)])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "rows.npz", **arrays)
    device = choose_device(config.device)
    batches = -(-len(inputs.caches["train"]) // config.batch_size)
    order = {
        **{name: getattr(config, name) for name in _SAME},
        "encoder": config.encoder,
        "layers": inputs.encoder.shape.layers,
        "rows_file": str(folder / "rows.npz"),
        "splits": [split for split in inputs.caches if split != "train"],
        "labels": inputs.task.outputs,
        "problem_type": inputs.task.problem_type,
        "batches": batches,
        "max_steps": max(1, round(config.epochs * batches)),
        "precision": choose_precision(config.precision, device),
        "device": device.type,
        "threads": config.threads,
    }
    return order, inputs.task


def train_peer(
    python: str, common: list[str], inputs: dict[str, Any], task: Task, folder: Path, seed: int
) -> tuple[bool, Figures]:
    """Let the Trainer train; returns whether it had not done so before with the same inputs, and its figures."""
    run_folder, result, order = folder / f"seed-{seed}", folder / f"seed-{seed}.json", {**inputs, "seed": seed}
    is_new = not result.is_file()
    study_runs.check_inputs(common, run_folder, is_new)
    if is_new:
        write_text(folder / f"seed-{seed}.order", json.dumps(order))
        study_runs.run([python, str(PEER_PROGRAM), str(folder / f"seed-{seed}.order"), str(result)], run_folder, is_new)
    found = json.loads(result.read_text(encoding="utf-8"))
    # The digests have told whether the rows are the same, wherever they are now.
    if {**found["order"], "rows_file": ""} != json.loads(json.dumps({**order, "rows_file": ""})):
        raise UserError(f"{result} was made with other options; remove it, or choose another --output-dir")
    figures: Figures = {}
    for split, (logits, labels) in found["predictions"].items():
        labels = np.array(labels, task.label_dtype)
        results = task.results_of(task.probabilities(torch.tensor(logits)).numpy(), labels)
        figures[split] = main_metric(task.metrics(results, labels))
    return is_new, {**figures, "best dev": figures["dev"], "seconds": study_runs.seconds_of(run_folder)}


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Compare settings with the Trainer; see also study --help.", allow_abbrev=False)
    parser.add_argument("--peer", required=True, type=peer_python, metavar="PYTHON", help="Python with transformers")
    own, rest = parser.parse_known_args(argv)
    asked = study.parse(rest)
    if TRAINER in asked.settings:
        raise UserError(f"--setting {TRAINER}: that name is taken; choose another")
    folder = asked.output_dir
    inputs, task = write_peer_inputs(asked.for_train, folder / TRAINER)
    peer = functools.partial(train_peer, own.peer, asked.for_train, inputs, task, folder / TRAINER)
    ours = {name: functools.partial(study_runs.train, words, folder / name) for name, words in asked.settings.items()}
    study_runs.run_and_compare(asked.seeds, folder, {TRAINER: peer, **ours})


if __name__ == "__main__":
    exit_on_user_error(main)
