"""The runs of bench.py: which processes are started in which order, and how their figures are summarized."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from sst2_xlmr.config import Config
from sst2_xlmr.data.rows import SST2_NAMES, Columns, read_rows
from sst2_xlmr.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
STEPS_ON_MANY_ROWS, DEV_ROWS = 5, 64
PEER_CONFIGURATIONS = {
    "train": ("padded", "dynamic", "grouped"),
    "eval": ("eval", "eval_bf16"),
    "int8": ("eval_fp32",),  # and eval_bf16
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Answer = dict[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rounded(figure: float) -> float:
    """Round to five significant digits, or to a whole number."""
    return round(figure) if figure >= 10_000 else float(f"{figure:.5g}")


def spread(figures: list[float]) -> Answer:
    return {
        "median": rounded(statistics.median(figures)),
        "min": rounded(min(figures)),
        "max": rounded(max(figures)),
    }


def summarize(answers: list[Answer]) -> Answer:
    """Return the median, minimum and maximum over the rounds of every number; of all else the last round's."""
    last = answers[-1]
    spreads = {
        name: spread([answer[name] for answer in answers if name in answer])  # some are measured in the last round
        for name, value in last.items()
        if type(value) in (int, float)
    }
    bounds = {bound: {name: values[bound] for name, values in spreads.items()} for bound in ("min", "max")}
    return {**last, **{name: values["median"] for name, values in spreads.items()}, **bounds}


def ratio(ours: list[Answer], others: list[Answer], name: str = "samples_per_s") -> Answer:
    """Return median, minimum and maximum of the quotients, each of two figures of one round."""
    return spread([our[name] / other[name] for our, other in zip(ours, others)])


def report(number: int, rounds: int, what: str, answer: Answer) -> None:
    memory = answer["peak_rss_bytes"] / 2**30
    say(f"round {number + 1}/{rounds}: {what}: {answer['samples_per_s']:.1f} rows/s, {memory:.2f} GiB")


def machine_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return GFLOP/s of a large square matrix product: the median of five, or of as many as a second allows."""
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=device).to(dtype)
    times: list[float] = []
    deadline = time.perf_counter() + 1
    while len(times) < 6 and (len(times) < 2 or time.perf_counter() < deadline):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:]) / 1e9  # the first prepares


def machine_rates(device: torch.device) -> Answer:
    return {f"{name}_gflop_per_s": machine_rate(device, dtype) for name, dtype in DTYPES.items()}


@contextlib.contextmanager
def worker(task: str, spec: Path, processes: int = 0) -> Iterator[Callable[..., Answer]]:
    """Start worker.py, under torchrun if `processes` are given; yields the function that asks it."""
    command = [str(HERE / "worker.py"), task, str(spec)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    if processes:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            "--nnodes=1",
            "--monitor_interval=0.5",
        ]
        environment.setdefault("OMP_NUM_THREADS", "1")  # or torchrun says that it does so
        command = [*launcher, "--master_addr=127.0.0.1", f"--master_port={port}", *command]
    pipes: Answer = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *command], env=environment, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        orders, answers = process.stdin, process.stdout

        def answer() -> Answer:
            line = answers.readline()
            if not line:  # it has said why on standard error
                raise SystemExit(process.wait() or 1)
            return json.loads(line)

        def ask(**order: Any) -> Answer:
            with contextlib.suppress(BrokenPipeError):  # then there is no answer either
                orders.write(json.dumps(order) + "\n")
                orders.flush()
            return answer()

        answer()  # it is ready
        yield ask


def run_peer(python: str, spec: Path, configuration: str) -> Answer:
    """Run peer.py.

    Raises:
        UserError: if there is no such interpreter, or it lacks what is needed.
    """
    command = [python, str(HERE / "peer.py"), str(spec), configuration]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"--peer {python}: {error.strerror}; give an environment's bin/python") from None
    try:
        return json.loads(run.stdout)
    except ValueError:
        reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}, no answer"])[-1]
        raise UserError(f"--peer {python} cannot run {configuration}: {reason}") from None


def measure_rates(tasks: list[str], peer: str, rounds: int, config: Config, spec: Path) -> Answer:
    """Measure the machine, this project and the peer, one after the other in every round.

    Args:
        tasks: of "train", "eval" and "int8", what to measure.
        peer: the Python that has the peer; an empty string for no comparison.
    """
    ours: dict[str, list[Answer]] = {task: [] for task in tasks}
    peers: dict[str, list[Answer]] = {name: [] for task in tasks for name in PEER_CONFIGURATIONS[task] if peer}
    versions = run_peer(peer, spec, "versions")["versions"] if peer else {}
    machine: list[Answer] = []
    device = torch.device(config.device)
    with contextlib.ExitStack() as running:
        for number in range(rounds):
            before = machine_rates(device)
            if peer or number == 0:
                asks = {task: running.enter_context(worker(task, spec)) for task in tasks}
            for task in tasks:
                answer = asks[task](epoch=number, phases=number == rounds - 1)
                ours[task].append(answer)
                report(number, rounds, task, answer)
            after = machine_rates(device)
            machine.append({name: max(before[name], after[name]) for name in before})  # either may be too low
            for task in tasks:
                answer = ours[task][-1]
                if task != "int8":
                    answer["utilisation"] = answer["model_gflop_per_s"] / machine[-1][f"{config.precision}_gflop_per_s"]
            if peer:
                running.close()  # the peer has the machine to itself
            for name, answers in peers.items():
                answers.append(run_peer(peer, spec, name))
                report(number, rounds, f"peer {name}", answers[-1])
    result: Answer = {task: summarize(answers) for task, answers in ours.items()}
    result["machine"] = summarize(machine)
    if "train" in tasks:
        result["peak_rss_bytes"] = result["train"]["max"]["peak_rss_bytes"]
        result["utilisation"] = result["train"]["utilisation"]
    ratios: Answer = {}
    if "int8" in tasks:
        ratios["int8 to eval"] = ratio(ours["int8"], ours["eval"])
    if peer:
        result["peer"] = {"versions": versions, **{name: summarize(answers) for name, answers in peers.items()}}
        for task in tasks:
            ratios.update({name: ratio(ours[task], peers[name]) for name in PEER_CONFIGURATIONS[task]})
        if "int8" in tasks:
            ratios["int8 to eval_bf16"] = ratio(ours["int8"], peers["eval_bf16"])
        if "grouped" in peers:
            ratios["peak_rss"] = ratio(ours["train"], peers["grouped"], "peak_rss_bytes")
    return {**result, "ratio": ratios} if ratios else result


def measure_processes(counts: list[int], rounds: int, spec: Path) -> Answer:
    """Train with each number of processes, of one thread each, on the same global batches; ratios are to the first."""
    answers: dict[int, list[Answer]] = {count: [] for count in counts}
    for number in range(rounds):
        for count in counts:
            with worker("train", spec, processes=count) as ask:
                answers[count].append(ask(epoch=number, phases=False))
            report(number, rounds, f"{count} processes", answers[count][-1])
    ratios = {str(count): ratio(answers[count], answers[counts[0]]) for count in counts[1:]}
    return {**{str(count): summarize(answers[count]) for count in counts}, "ratio": ratios}


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
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
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
