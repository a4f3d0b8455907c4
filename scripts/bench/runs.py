"""The runs of bench.py: which processes are started in which order."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import torch
from figures import Answer, ratio, report, summarize

from sst2_xlmr.config import Config
from sst2_xlmr.util.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
PEER_CONFIGURATIONS = {
    "train": ("padded", "dynamic", "grouped"),
    "eval": ("eval", "eval_bf16"),
    "int8": ("eval_fp32",),  # and eval_bf16
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
