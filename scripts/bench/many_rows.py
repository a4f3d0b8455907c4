"""How long train.py takes to its first step, and how much memory, as the data grows."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from figures import Answer, rounded, say
from runs import ROOT, worker

from sst2_xlmr.config import Config
from sst2_xlmr.data.rows import SST2_NAMES, Columns, read_rows
from sst2_xlmr.training.run_folder import read_metrics
from sst2_xlmr.util.errors import UserError

STEPS_ON_MANY_ROWS, DEV_ROWS = 5, 64


def write_many_rows(source: Path, target: Path, count: int, seed: int) -> None:
    """Write `count` rows, each the beginning of one of the source's sentences and the end of another.

    Both are cut at the same random fraction, so the mean length stays the same, and nearly every row is new.
    """
    rows = [(text.split(), label) for text, _, label in read_rows(source, Columns(), SST2_NAMES)]
    random = np.random.RandomState(seed)
    with target.open("w", encoding="utf-8") as file:
        file.write("sentence\tlabel\n")
        for _ in range(count):
            (first, label), (second, _) = (rows[row] for row in random.randint(len(rows), size=2))
            cut = random.random_sample()
            words = first[: round(cut * len(first))] + second[round(cut * len(second)) :]
            file.write(f"{' '.join(words or first)}\t{label}\n")


def time_train(config: Config, data: Path, encoder: Path, cache: Path, rows: int) -> Answer:
    """Run train.py for a few steps.

    Returns:
        Seconds from its start to its first line of metrics, i.e. one step, and to its end; peak memory, which begins
        with that of this process; the rate of the steps after the first.
    """
    run_folder = data / "run"
    command = [sys.executable, str(ROOT / "train.py"), "--encoder", str(encoder), "--data-dir", str(data)]
    command += ["--output-dir", str(run_folder), "--max-steps", str(STEPS_ON_MANY_ROWS), "--log-every", "1"]
    for name in ("max_length", "batch_size", "device", "precision", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    command += ["--full-vocabulary"] * config.full_vocabulary + ["--no-compile"] * (not config.compile)
    environment = {**os.environ, "SST2_XLMR_CACHE": str(cache)}
    first_step_s = 0.0
    start = time.perf_counter()
    with (data / "stderr").open("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step ") and not first_step_s:
                first_step_s = time.perf_counter() - start
        _, status, usage = os.wait4(process.pid, 0)
        total_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if process.returncode:
            raise UserError(f"train.py failed on {rows} rows: {(errors.read().splitlines() or ['no message'])[-1]}")
    lines = read_metrics(run_folder / "metrics.jsonl")
    shutil.rmtree(run_folder)
    return {
        "first_step_s": rounded(first_step_s),
        "rows_per_s_to_first_step": rounded(rows / first_step_s),
        "total_s": rounded(total_s),
        "samples_per_s": rounded(statistics.median([line["samples_per_s"] for line in lines if "lr" in line][1:])),
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def measure_rows(counts: list[int], files: dict[str, Path], config: Config, spec: Path) -> Answer:
    """Start train.py on files of each number of rows twice: without a token cache, and with that of the first start."""
    with worker("weights", spec):
        encoder = spec.parent / "encoder"
    results: Answer = {}
    for count in counts:
        data = spec.parent / f"{count}-rows"
        data.mkdir()
        write_many_rows(files["train"], data / "train.tsv", count, config.seed)
        write_many_rows(files["dev"], data / "dev.tsv", DEV_ROWS, config.seed)
        results[str(count)] = {}
        for state in ("cold", "warm"):
            answer = results[str(count)][state] = time_train(config, data, encoder, data / "cache", count)
            say(f"{count:,} rows, {state}: {answer['first_step_s']:.1f} s to the first step")
        shutil.rmtree(data)
    return results
