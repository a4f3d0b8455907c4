"""Measure training, evaluation and prediction, beside another checkout of this project or transformers' Trainer.

    python scripts/bench/bench.py --data-dir data/SST-2 --peer ../peer/bin/python     # beside the Trainer
    python scripts/bench/bench.py --data-dir data/SST-2 --against ../before --plain   # beside another checkout
    python scripts/bench/bench.py --only eval int8 --busy 1                           # with other work on the cores

Prints JSON. Machines are noisy: a round measures everything once, one after the other, every second round backwards.
Figures are medians of the rounds, with minimum and maximum; ratios ("A / B" is A's figure divided by B's) are taken
round by round. What is measured are commands: train.py, scripts/evaluate.py and scripts/predict.py of each checkout,
and peer.py under --peer's Python (see study_with_trainer.py), with random weights. Peak memory is that of the whole
command, of the largest of its processes.

    train      `ours`; with --plain also `plain`, --no-compile; both of the other checkout, too; `trainer`, with rows of
               like length in a batch, its best setting. Ours is timed after --warmup-steps of an epoch, the Trainer
               in its second epoch on 50 batches that are spread evenly over the file's lengths.
    eval       evaluating --eval-rows rows; the time to start is taken from a run on a few rows
    int8       the same in 8 bits, beside eval's, and the Trainer's fp32
               Both of them with --runtimes also by ONNX Runtime and OpenVINO, from token ids; see runtimes.py.
    predict    from a file of texts to one of labels, in the same way as eval
    processes  training with so many processes of one thread
    rows       train.py's start on files of so many rows, without cached tokens (cold) and with them (warm)
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inputs import ROOT, SHAPES, write_encoder, write_repeated_rows, write_typical_rows
from study_with_trainer import PEER_PROGRAM, peer_python, write_peer_inputs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sst2_xlmr.cli import OneLineParser, positive
from sst2_xlmr.training.run_folder import read_metrics
from sst2_xlmr.util.cores import available_cores
from sst2_xlmr.util.device import choose_device
from sst2_xlmr.util.errors import UserError, exit_on_user_error

PARTS = ("train", "eval", "predict", "int8", "processes", "rows")
RUNTIMES_PROGRAM = PEER_PROGRAM.with_name("runtimes.py")
FEW_ROWS, PEER_BATCHES = 8, 50  # the Trainer sorts 50 batches at a time
Figures = dict[str, Any]


def spread(figures: list[float]) -> Figures:
    """Return median, minimum and maximum, rounded to five significant digits or to a whole number."""
    found = {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}
    return {name: round(figure) if figure >= 10_000 else float(f"{figure:.5g}") for name, figure in found.items()}


def ratios(rounds: dict[str, list[Figures]]) -> Figures:
    """Return "A / B" -> the spread of the ratios of rate and memory, for every contender A and every later one B.

    Rates of training are compared by tokens, since the rows of both sides may differ a little in length.
    """
    found = {}
    for name, other in itertools.combinations(rounds, 2):
        pairs = list(zip(rounds[name], rounds[other]))
        shared = pairs[0][0].keys() & pairs[0][1].keys()
        rate = "tokens_per_s" if "tokens_per_s" in shared else "samples_per_s"
        figures = [rate, *sorted(shared & {"peak_rss_bytes", "peak_cuda_bytes"})]
        found[f"{name} / {other}"] = {figure: spread([a[figure] / b[figure] for a, b in pairs]) for figure in figures}
    return found


def run(command: list[str], environment: dict[str, str]) -> Figures:
    """Run a command; returns when it `started` (seconds of the clock), its `seconds`, and `peak_rss_bytes`.

    Linux begins to measure a process's peak with that of its parent, so this process must stay small. If the command
    fails, UserError with the last line that it said.
    """
    started = time.time()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        variables = {**os.environ, **environment}
        process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=said, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            last = [f"exit status {process.returncode}", *said.read().splitlines()][-1]
            raise UserError(f"{' '.join(command[:2])} failed: {last}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"started": started, "seconds": time.time() - started, "peak_rss_bytes": peak}


def run_program(root: Path, program: str, options: list[Any], folder: Path, processes: int = 0) -> Figures:
    """Run train.py, scripts/evaluate.py, ... of a checkout, perhaps under torchrun; see `run`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    cache = folder / ("cache" if root == ROOT else "cache-against")  # another version may write other files there
    environment = {"PYTHONPATH": path, "SST2_XLMR_CACHE": str(cache), **({"OMP_NUM_THREADS": "1"} if processes else {})}
    return run([sys.executable, *launcher, str(root / program), *map(str, options)], environment)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description="Measure training, evaluation, prediction; prints JSON.", allow_abbrev=False)
    add, tokenizer = parser.add_argument, ROOT / "models" / "small" / "sentencepiece.bpe.model"
    add("--shape", default="xlmr.base", choices=SHAPES, help="of the encoder [xlmr.base]")
    add("--data-dir", default=ROOT / "sample_data", type=Path, metavar="DIR", help="train.tsv, dev.tsv [sample_data]")
    add("--tokenizer", default=tokenizer, type=Path, metavar="FILE", help="SentencePiece model [that of models/small]")
    add("--batch-size", type=positive, default=16, metavar="ROWS", help="rows per optimizer step [16]")
    add("--steps", type=positive, default=90, metavar="N", help="timed optimizer steps [90]")
    add("--warmup-steps", type=positive, default=10, metavar="N", help="steps before them; must divide --steps [10]")
    add("--eval-rows", type=positive, default=4000, metavar="N", help="rows to evaluate and to predict [4000]")
    add("--rounds", type=positive, default=3, metavar="N", help="how often everything is measured [3]")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="[auto]")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="[auto]")
    add("--plain", action="store_true", help="also train with --no-compile")
    add("--against", type=Path, metavar="DIR", help="also measure another checkout of this project")
    add("--peer", type=peer_python, metavar="PYTHON", help="also measure the Trainer, with an environment's bin/python")
    add("--runtimes", type=peer_python, metavar="PYTHON", help="also ONNX Runtime and OpenVINO, with such a Python")
    add("--busy", type=int, default=0, metavar="N", help="with so many busy loops of other processes [0]")
    add("--processes", type=positive, nargs="+", default=[2, 1], metavar="N", help="train with so many processes [2 1]")
    add("--rows", type=positive, nargs="+", default=[10_000], metavar="N", help="start on so many rows [10000]")
    add("--only", nargs="+", choices=PARTS, default=PARTS[:3], help="what to measure [train eval predict]")
    arguments = parser.parse_args(argv)
    if arguments.steps % arguments.warmup_steps:
        raise UserError(f"--steps {arguments.steps} is not a multiple of --warmup-steps {arguments.warmup_steps}")
    files = [arguments.tokenizer, arguments.data_dir / "train.tsv", arguments.data_dir / "dev.tsv"]
    for file in [*files, *([arguments.against / "train.py"] if arguments.against else [])]:
        if not file.is_file():
            raise UserError(f"no file {file}; see --tokenizer, --data-dir and --against")
    arguments.device = choose_device(arguments.device).type
    return arguments


def write_inputs(arguments: argparse.Namespace, folder: Path) -> None:
    """Write encoder/, encoder-model/, few.tsv, eval.tsv and typical.tsv into a folder."""
    # In a process of its own, whose memory would else be taken for that of the commands.
    words = (folder / "encoder", arguments.tokenizer, SHAPES[arguments.shape])
    writer = multiprocessing.get_context("spawn").Process(target=write_encoder, args=words)
    writer.start()
    writer.join()
    write_repeated_rows(arguments.data_dir / "dev.tsv", folder / "eval.tsv", arguments.eval_rows)
    write_typical_rows(arguments.data_dir / "dev.tsv", folder / "few.tsv", FEW_ROWS)
    write_typical_rows(arguments.data_dir / "train.tsv", folder / "typical.tsv", PEER_BATCHES * arguments.batch_size)


def train_options(arguments: argparse.Namespace, folder: Path, train_file: Path) -> list[Any]:
    """Return train.py's options, with warm-up to the end: before it, nobody expects random weights to learn."""
    files = ["--train-file", train_file, "--dev-file", folder / "few.tsv", "--encoder", folder / "encoder"]
    computing = ["--batch-size", arguments.batch_size, "--precision", arguments.precision, "--device", arguments.device]
    return [*files, *computing, "--max-length", 128, "--eval-every", 0, "--warmup-ratio", 1]


def train(
    arguments: argparse.Namespace, folder: Path, root: Path, *more: Any, file: Path | None = None, processes: int = 0
) -> Figures:
    """Train for some steps of an epoch, perhaps on another file than --data-dir's, with more options.

    Returns the rates of all lines of metrics but the first, the seconds until that one, and memory.
    """
    steps = ["--max-steps", arguments.warmup_steps + arguments.steps, "--log-every", arguments.warmup_steps]
    options = [*train_options(arguments, folder, file or arguments.data_dir / "train.tsv"), *steps, *more]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        run_folder = Path(temporary, "run")
        used = run_program(root, "train.py", [*options, "--output-dir", run_folder], folder, processes)
        lines = [line for line in read_metrics(run_folder / "metrics.jsonl") if "lr" in line][1:]
        events = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        memory = events.Scalars("train/memory_gb")
    # All lines are of equally many rows.
    found = {"samples_per_s": statistics.harmonic_mean([line["samples_per_s"] for line in lines])}
    tokens_per_row = statistics.mean(line["tokens_per_s"] / line["samples_per_s"] for line in lines)
    found["tokens_per_s"] = found["samples_per_s"] * tokens_per_row
    if arguments.device == "cuda":
        found["peak_cuda_bytes"] = max(event.value for event in memory) * 1e9
    return {**found, "first_line_s": memory[0].wall_time - used["started"], "peak_rss_bytes": used["peak_rss_bytes"]}


def run_inference(arguments: argparse.Namespace, folder: Path, root: Path, program: str, precision: str) -> Figures:
    """Evaluate, or predict; returns rows/s, without the time to start, and memory."""
    used = {}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for number, name in enumerate(("few", "few", "eval")):  # the first one compiles, and fills caches
            options = ["--model", folder / "encoder-model", "--device", arguments.device, "--precision", precision]
            files = ["--file", folder / f"{name}.tsv"]
            if program == "predict":
                files = ["--input", folder / f"{name}.tsv", "--output", Path(temporary, f"{number}.tsv")]
            used[name] = run_program(root, f"scripts/{program}.py", [*options, *files], folder)
    rows, seconds = arguments.eval_rows - FEW_ROWS, used["eval"]["seconds"] - used["few"]["seconds"]
    if seconds <= 0:
        raise UserError(f"--eval-rows {arguments.eval_rows} took no longer than {FEW_ROWS}: give more")
    return {"samples_per_s": rows / seconds, "peak_rss_bytes": used["eval"]["peak_rss_bytes"]}


def run_peer(python: str, folder: Path, order: dict[str, Any], program: Path = PEER_PROGRAM) -> Figures:
    """Let peer.py, or runtimes.py, do what an order says; returns its rates, memory and versions."""
    (folder / "order.json").write_text(json.dumps({"seed": 0, **order}), encoding="utf-8")
    files = [str(folder / name) for name in ("order.json", "result.json")]
    used = run([python, str(program), *files], {"PYTHONPATH": ""})
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    names = ("samples_per_s", "tokens_per_s", "peak_cuda_bytes", "versions")
    return {**{name: found[name] for name in names if name in found}, "peak_rss_bytes": used["peak_rss_bytes"]}


def contenders(arguments: argparse.Namespace, folder: Path, task: str) -> dict[str, Callable[[], Figures]]:
    """Return what is compared in a task: name -> what measures it once."""
    found: dict[str, Callable[[], Figures]] = {}
    trains, infers = (functools.partial(function, arguments, folder) for function in (train, run_inference))
    if task == "processes":
        return {str(n): functools.partial(trains, ROOT, "--threads", 1, processes=n) for n in arguments.processes}
    if task == "int8":
        found["int8"] = functools.partial(infers, ROOT, "evaluate", "int8")
    for name, root in (("ours", ROOT), ("against", arguments.against and arguments.against.absolute())):
        if root and task == "train":
            found[name] = functools.partial(trains, root)
            if arguments.plain:
                found["plain" if name == "ours" else "against-plain"] = functools.partial(trains, root, "--no-compile")
        elif root:
            program = "predict" if task == "predict" else "evaluate"
            found[name] = functools.partial(infers, root, program, arguments.precision)
    if task == "predict" or not (arguments.runtimes or arguments.peer):
        return found
    words = [*train_options(arguments, folder, folder / "typical.tsv"), "--test-file", folder / "eval.tsv"]
    order, _ = write_peer_inputs([str(word) for word in words], folder / "peer")
    if arguments.runtimes and task != "train":
        exported = {**order, "onnx": str(folder / "model.onnx"), "threads": available_cores()}
        options = ["--model", folder / "encoder-model", "--format", "onnx", "--from-ids", "--output", exported["onnx"]]
        run_program(ROOT, "scripts/export.py", options, folder)
        precisions = {order["precision"], "int8"} if task == "int8" else {order["precision"]}
        for runtime, precision in itertools.product(("onnxruntime", "openvino"), sorted(precisions)):
            own = {**exported, "runtime": runtime, "precision": precision}
            run_one = functools.partial(run_peer, arguments.runtimes, folder, own, RUNTIMES_PROGRAM)
            found[f"{runtime}-{precision}"] = run_one
    if arguments.peer:
        orders = {"trainer": {**order, "splits": [], "max_steps": 2 * order["batches"]}}
        if task != "train":
            orders = {"trainer": {**order, "encoder": str(folder / "encoder-model"), "split": "eval"}}
        if task == "int8" and order["precision"] != "fp32":
            orders["trainer-fp32"] = {**orders["trainer"], "precision": "fp32"}
        found.update({name: functools.partial(run_peer, arguments.peer, folder, orders[name]) for name in orders})
    return found


def measure(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Measure what the command line asks for."""
    write_inputs(arguments, folder)
    covered = {"rows", "eval"} if "int8" in arguments.only else {"rows"}
    measures = {task: contenders(arguments, folder, task) for task in arguments.only if task not in covered}
    rounds: dict[str, dict[str, list[Figures]]] = {task: {name: [] for name in measures[task]} for task in measures}
    jobs = [(task, name) for task in measures for name in measures[task]]
    for number in range(arguments.rounds):
        for task, name in jobs if number % 2 == 0 else reversed(jobs):
            found = measures[task][name]()
            rounds[task][name].append(found)
            rate, memory = found["samples_per_s"], found["peak_rss_bytes"] / 2**30
            place = f"round {number + 1}/{arguments.rounds}: {task}: {name}"
            print(f"{place}: {rate:.1f} rows/s, {memory:.2f} GiB", file=sys.stderr, flush=True)
    result: Figures = {"settings": {name: str(value) for name, value in vars(arguments).items()}}
    for task, by_name in rounds.items():
        result[task] = {"ratios": ratios(by_name)}
        for name, measured in by_name.items():
            numbers = [figure for figure, value in measured[0].items() if isinstance(value, (int, float))]
            spreads = {figure: spread([each[figure] for each in measured]) for figure in numbers}
            result[task][name] = {**measured[0], **spreads}
    for count in arguments.rows if "rows" in arguments.only else []:
        file = folder / f"{count}.tsv"
        write_repeated_rows(arguments.data_dir / "train.tsv", file, count)
        start = functools.partial(train, arguments, folder, ROOT, "--log-every", 1, "--max-steps", 5, file=file)
        result.setdefault("rows", {})[str(count)] = {"cold": start(), "warm": start()}
    return result


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep cores busy with other processes."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(1 if loops else 0)
        yield
    finally:
        for loop in loops:
            loop.kill()


def main(argv: list[str] | None = None) -> None:
    arguments = parse_args(argv)
    with busy_loops(arguments.busy), tempfile.TemporaryDirectory(prefix="sst2-xlmr-bench-") as temporary:
        print(json.dumps(measure(arguments, Path(temporary)), indent=2))


if __name__ == "__main__":
    exit_on_user_error(main)
