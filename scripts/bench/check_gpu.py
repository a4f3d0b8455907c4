"""See scripts/check_gpu.sh, which runs this."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Callable

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA is there, for repetitions


# isort: split
import gpu_checks
import numpy as np
import torch
from bench import SHAPES, positives
from figures import Answer, ratio, say, summarize
from runs import machine_rates, run_peer, worker
from sample_rows import make_tokenizer, write_rows
from spec import Setup, find_files, read_tokens, write_spec
from worker import read_spec

from sst2_xlmr.cli import OneLineParser, positive
from sst2_xlmr.config import Config
from sst2_xlmr.data.rows import SST2_NAMES
from sst2_xlmr.model.encoders import TOKENIZER_NAME, EncoderShape
from sst2_xlmr.util import versions
from sst2_xlmr.util.distributed import choose_device
from sst2_xlmr.util.errors import UserError, exit_on_user_error
from sst2_xlmr.util.precision import choose_precision

PIECES = 2000  # of the tokenizer
TABLE_ROWS = 9_370  # embedding rows that SST-2 uses
PEER_BATCH_SIZES = (32, 256)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="check_gpu.sh", description="Prove and measure training on a GPU.", allow_abbrev=False)
    add = parser.add_argument
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the checks themselves [cuda]")
    add("--shape", default="xlmr.base", choices=tuple(SHAPES), help="of the encoder that is measured [xlmr.base]")
    add("--layers", type=positive, metavar="N", help="so many layers instead of the shape's")
    add("--batch-sizes", type=positives, default=[16, 32, 128, 256], metavar="N,...", help="[16,32,128,256]")
    add("--steps", type=positive, default=40, metavar="N", help="timed optimizer steps per round [40]")
    add("--rounds", type=positive, default=3, metavar="N", help="how often everything is measured [3]")
    add("--no-peer", action="store_true", help="leave the Trainer out also where transformers is installed")
    add("--out", type=Path, metavar="FILE", help="write the JSON there too")
    arguments = parser.parse_args(argv)
    if arguments.out and not arguments.out.absolute().parent.is_dir():
        raise UserError(f"--out {arguments.out}: its folder does not exist")
    return arguments


class Inputs:
    """Rows, tokenizer and specifications, in a temporary folder."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, device: torch.device) -> None:
        self.folder, self.data, self.arguments = folder, folder / "data", arguments
        self.tokenizer_file = folder / TOKENIZER_NAME
        make_tokenizer(self.tokenizer_file, PIECES)
        write_rows(self.data, rows=max(arguments.batch_sizes) * 200)
        os.environ["SST2_XLMR_CACHE"] = str(folder / "cache")
        self.config = Config(
            data_dir=str(self.data),
            label_names=SST2_NAMES,
            max_length=128,
            device=device.type,
            precision=choose_precision("auto", device),
            threads=torch.get_num_threads(),
        )

    def write(self, name: str, shape: EncoderShape, batch_size: int, steps: int, lr: float = 2e-5) -> Path:
        """Write a specification with as many embedding rows as SST-2 uses; returns its path."""
        if self.arguments.layers:
            shape = dataclasses.replace(shape, layers=self.arguments.layers)
        config = dataclasses.replace(self.config, batch_size=batch_size, lr=lr)
        setup = Setup(config, shape, self.tokenizer_file, steps, 5, 64)
        spec = write_spec(self.folder / name, read_tokens(find_files(str(self.data)), setup), setup)
        with np.load(spec.with_name("rows.npz")) as arrays:
            changed = {**arrays, "kept_ids": np.union1d(arrays["kept_ids"], np.arange(TABLE_ROWS))}
        np.savez(spec.with_name("rows.npz"), **changed)
        return spec


def run_checks(inputs: Inputs, device: torch.device) -> Answer:
    """Run all checks; a result has `figures`, or says in `failed` why it has none."""
    file = inputs.write("checks", SHAPES["small"], batch_size=16, steps=100, lr=5e-5)
    spec = read_spec(file)
    checks: dict[str, Callable[[], Answer]] = {
        "parity with the CPU": lambda: gpu_checks.check_parity(spec, device),
        "bf16 learns as fp32": lambda: gpu_checks.check_bf16(spec, device),
        "the update compiles": lambda: gpu_checks.check_update(device),
        "repetition": lambda: gpu_checks.check_repetition(spec, device),
        "resume to the bit": lambda: gpu_checks.check_resume(
            write_encoder(file), inputs.data, inputs.folder / "runs", device
        ),
    }
    if device.type == "cuda":
        checks["no waiting in a step"] = lambda: gpu_checks.check_no_waiting(spec, device)
    results: Answer = {}
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            results[name] = {"figures": check()}
        except Exception as error:  # the other checks are worth their results
            traceback.print_exc()
            results[name] = {"failed": str(error) or type(error).__name__}
        results[name]["seconds"] = round(time.perf_counter() - start, 1)
        say(f"{name}: {results[name]}")
    return results


def write_encoder(spec: Path) -> Path:
    """Write an encoder's folder with random weights; returns it."""
    with worker("weights", spec):
        return read_spec(spec).encoder_folder


def measure(inputs: Inputs, has_peer: bool) -> Answer:
    """Measure training at every batch size, and the Trainer at some, one after the other in every round."""
    arguments = inputs.arguments
    results: Answer = {}
    for batch_size in arguments.batch_sizes:
        spec = inputs.write(f"batch-{batch_size}", SHAPES[arguments.shape], batch_size, arguments.steps)
        ours, peers = [], []
        for number in range(arguments.rounds):
            with worker("train", spec) as ask:
                ours.append(ask(epoch=number, phases=number == arguments.rounds - 1))
            if has_peer and batch_size in PEER_BATCH_SIZES:
                peers.append(run_peer(sys.executable, spec, "grouped"))
        results[str(batch_size)] = summarize(ours)
        if peers:
            results[str(batch_size)]["trainer"] = summarize(peers)
            results[str(batch_size)]["times_the_trainer"] = ratio(ours, peers)
        say(f"batch {batch_size}: {results[str(batch_size)]}")
    return results


def table(result: Answer) -> list[str]:
    """Return the result in lines."""
    lines = [result["device"], result["stack"], ""]
    for name, check in result["checks"].items():
        lines.append(f"{name:<22}{'FAILED' if 'failed' in check else 'ok':<8}{check.get('failed', '')[:200]}")
    head = ("batch", "rows/s", "ms/step", "launches", "busy", "GiB", "Trainer", "times")
    lines += ["", "".join(f"{name:>10}" for name in head) + "   data, forward, backward, norm, step (ms)"]
    for size, figures in result["training"].items():
        gib = figures.get("peak_cuda_bytes", figures["peak_rss_bytes"]) / 2**30
        cells: list[Any] = [
            size,
            f"{figures['samples_per_s']:.0f}",
            f"{int(size) / figures['samples_per_s'] * 1e3:.2f}",
        ]
        cells += [figures.get("launches_per_step", "-"), figures.get("gpu_busy_share_profiled", "-"), f"{gib:.2f}"]
        cells.append(f"{figures['trainer']['samples_per_s']:.0f}" if "trainer" in figures else "-")
        cells.append(figures["times_the_trainer"]["median"] if "trainer" in figures else "-")
        phases = ", ".join(f"{value:g}" for value in figures["ms_per_step"].values())
        lines.append("".join(f"{cell!s:>10}" for cell in cells) + f"   {phases}")
    return lines


def main(argv: list[str] | None = None) -> None:
    arguments = parse_args(argv)
    device = choose_device(arguments.device)
    has_peer = not arguments.no_peer and all(importlib.util.find_spec(name) for name in ("transformers", "accelerate"))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sst2-xlmr-gpu-") as temporary:
        inputs = Inputs(Path(temporary), arguments, device)
        result: Answer = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, to try the checks",
            "stack": f"{versions.description()}, CUDA {torch.version.cuda}",
            "checks": run_checks(inputs, device),
            "training": measure(inputs, has_peer),
            "machine": machine_rates(device),
        }
    result["seconds"] = round(time.perf_counter() - start, 1)
    text = json.dumps(result)
    print("\n".join([*table(result), "", text]))
    if arguments.out:
        try:
            arguments.out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write --out {arguments.out}: {error.strerror}") from None
    if any("failed" in check for check in result["checks"].values()):
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
