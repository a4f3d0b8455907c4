"""See scripts/check_gpu.sh, which runs this.

Every check runs train.py and scripts/predict.py on the device, perhaps on the CPU too, and returns its figures, or
raises AssertionError. With --device cpu they compare the CPU with itself.
"""

import argparse
import functools
import importlib.util
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import bench
import numpy as np
import torch
from bench import Figures, run_program
from inputs import ROOT, SAMPLE_DATA, SHAPES, make_tokenizer, write_encoder, write_repeated_rows
from safetensors.torch import load_file

from sst2_xlmr.cli import OneLineParser, positive
from sst2_xlmr.training.run_folder import read_metrics
from sst2_xlmr.util import versions
from sst2_xlmr.util.device import choose_device
from sst2_xlmr.util.errors import exit_on_user_error
from sst2_xlmr.util.files import digest_of

Train = Callable[..., Path]
PEER_BATCH_SIZES = (32, 256)
MODEL = Path("model", "model.safetensors")
NO_DROPOUT = ("--dropout", 0, "--head-dropout", 0)


def write_inputs(folder: Path, shape: str, rows: int) -> None:
    """Write tokenizer.model, train.tsv, dev.tsv, and an encoder, checked/, into a folder."""
    make_tokenizer(folder / "tokenizer.model", pieces=2000)
    write_repeated_rows(SAMPLE_DATA / "train.tsv", folder / "train.tsv", rows)
    write_repeated_rows(SAMPLE_DATA / "dev.tsv", folder / "dev.tsv", 64)
    write_encoder(folder / "checked", folder / "tokenizer.model", SHAPES[shape])


def run_train(
    folder: Path, device: str, shape: str, name: str, *options: object, steps: int = 30, processes: int = 0
) -> Path:
    """Train, in fp32 on the device unless options say otherwise, or resume; returns the run's folder."""
    words: list[object] = ["--resume"]
    if not (folder / name).exists():
        words = ["--data-dir", folder, "--encoder", folder / shape, "--device", device, "--precision", "fp32"]
        words += ["--batch-size", 16, "--max-length", 64, "--lr", 1e-4, "--log-every", 1, "--eval-every", 0]
        words += ["--max-steps", steps, *options]
    run_program(ROOT, "train.py", [*words, "--output-dir", folder / name], folder, processes)
    return folder / name


def losses(run_folder: Path) -> np.ndarray:
    return np.array([line["loss"] for line in read_metrics(run_folder / "metrics.jsonl") if "lr" in line])


def check_parity(train: Train, folder: Path, device: str) -> Figures:
    """Losses and weights of 30 steps in fp32 without dropout are a CPU's, also with micro-batches and by torchrun."""
    cpu = train("cpu", *NO_DROPOUT, "--device", "cpu", "--no-compile")
    runs = {
        "alone": train("alone", *NO_DROPOUT),
        "micro-batches": train("micro-batches", *NO_DROPOUT, "--micro-batch-size", 4),
        "torchrun": train("torchrun", *NO_DROPOUT, processes=1),
    }
    figures = {f"{name}: loss": float(np.abs(losses(run) / losses(cpu) - 1).max()) for name, run in runs.items()}
    assert max(figures.values()) < 1e-4, figures
    files = [runs["alone"] / MODEL, cpu / MODEL, folder / "checked" / "model.safetensors"]
    names = sorted(load_file(files[2]).keys() & load_file(files[1]).keys())  # all but the head, which is new
    ours, theirs, before = (torch.cat([weights[name].flatten() for name in names]) for weights in map(load_file, files))
    figures["weights, of their change"] = float((ours - theirs).norm() / (before - theirs).norm())
    assert figures["weights, of their change"] < 0.02, figures
    return figures


def check_lower_precision(train: Train, folder: Path, device: str) -> Figures:
    """bf16 (and tf32) learns as fp32 does: the same mean loss over 100 steps."""
    precisions = ("fp32", "bf16", "tf32") if device == "cuda" else ("fp32", "bf16")
    curves = {p: losses(train(f"curve-{p}", *NO_DROPOUT, "--precision", p, steps=100)) for p in precisions}
    figures = {name: float(np.mean(curves[name] - curves["fp32"])) for name in precisions[1:]}
    assert all(abs(difference) < 0.02 for difference in figures.values()), figures
    return figures


def check_bits(train: Train, folder: Path, device: str) -> Figures:
    """With --deterministic a second run, and that one resumed from its middle, leave the same bits."""
    figures = {}
    for precision in ("fp32", "bf16", "tf32") if device == "cuda" else ("fp32", "bf16"):
        options = ("--precision", precision, "--deterministic", "--save-every", 10)
        first, second = (train(f"{precision}-{name}", *options, steps=20) for name in ("first", "second"))
        figures[f"{precision} repeated"] = digest_of(first / MODEL) == digest_of(second / MODEL)
        for name in ("model", "best", "checkpoints/step-00000020"):
            shutil.rmtree(second / name)
        figures[f"{precision} resumed"] = digest_of(first / MODEL) == digest_of(train(second.name) / MODEL)
    assert all(figures.values()), figures
    return figures


def check_prediction(train: Train, folder: Path, device: str) -> Figures:
    """Probabilities of a trained model are a CPU's: to 1e-3 in fp32, to 0.05 in bf16."""
    model, found = train("trained", steps=100) / "model", {}
    for name, *computing in (("cpu", "cpu", "fp32"), ("fp32", device, "fp32"), ("bf16", device, "bf16")):
        output = folder / f"{name}.jsonl"
        options = ["--model", model, "--device", computing[0], "--precision", computing[1], "--all-probabilities"]
        run_program(ROOT, "scripts/predict.py", [*options, "--input", folder / "dev.tsv", "--output", output], folder)
        rows = map(json.loads, output.read_text(encoding="utf-8").splitlines())
        found[name] = np.array([row["probability_1"] for row in rows])
    figures = {name: float(np.abs(found[name] - found["cpu"]).max()) for name in ("fp32", "bf16")}
    assert figures["fp32"] < 1e-3, figures
    assert figures["bf16"] < 0.05, figures
    return figures


def run_checks(folder: Path, device: str, shape: str) -> Figures:
    """Run all checks; a result has `figures`, or says in `failed` why it has none."""
    results: Figures = {}
    for check in (check_parity, check_lower_precision, check_bits, check_prediction):
        name, start = check.__name__.removeprefix("check_").replace("_", " "), time.perf_counter()
        try:
            results[name] = {"figures": check(functools.partial(run_train, folder, device, shape), folder, device)}
        except Exception as error:  # the other checks are worth their results
            traceback.print_exc()
            results[name] = {"failed": str(error) or type(error).__name__}
        results[name]["seconds"] = round(time.perf_counter() - start, 1)
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    return results


def measure(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Measure training at every batch size, and the Trainer at some of them on a GPU."""
    has_peer = arguments.device == "cuda" and all(map(importlib.util.find_spec, ("transformers", "accelerate")))
    results: Figures = {}
    for batch_size in arguments.batch_sizes:
        words = ["--only", "train", "--data-dir", folder, "--tokenizer", folder / "tokenizer.model"]
        words += ["--batch-size", batch_size, "--warmup-steps", arguments.steps]
        for name in ("device", "shape", "steps", "rounds"):
            words += [f"--{name}", getattr(arguments, name)]
        if has_peer and batch_size in PEER_BATCH_SIZES:
            words += ["--peer", sys.executable]
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            found = bench.measure(bench.parse_args([str(word) for word in words]), Path(temporary))
        results[str(batch_size)] = found["train"]
    return results


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="check_gpu.sh", description="Check and measure training on a GPU.", allow_abbrev=False)
    add = parser.add_argument
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the checks themselves [cuda]")
    add("--shape", default="xlmr.base", choices=SHAPES, help="of the encoder that is measured [xlmr.base]")
    add("--batch-sizes", type=positive, nargs="+", default=[16, 32, 128, 256], help="[16 32 128 256]")
    add("--steps", type=positive, default=40, metavar="N", help="timed optimizer steps per round [40]")
    add("--rounds", type=positive, default=3, metavar="N", help="how often everything is measured [3]")
    arguments = parser.parse_args(argv)
    device = choose_device(arguments.device)
    with tempfile.TemporaryDirectory(prefix="sst2-xlmr-gpu-") as temporary:
        folder = Path(temporary)
        write_inputs(folder, "tiny" if arguments.shape == "tiny" else "small", rows=max(arguments.batch_sizes) * 200)
        result: Figures = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, to try the checks",
            "versions": f"{versions.versions()}, CUDA {torch.version.cuda}",
            "checks": run_checks(folder, arguments.device, "checked"),
            "training": measure(arguments, folder),
        }
    print(json.dumps(result))
    if any("failed" in check for check in result["checks"].values()):
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
