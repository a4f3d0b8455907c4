"""Fine-tune XLM-R for text classification; the loop is `train`.

Data flow: files -> rows -> ids -> global batches -> model -> loss -> step -> checkpoints and model folder.
"""

if __name__ == "__main__":  # torchrun -m sst2_xlmr.train: report missing packages before an import below fails
    from sst2_xlmr.__main__ import main as start_program

    start_program("train")

import contextlib
import json
import math
import shlex
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from sst2_xlmr.cli import parse_args, train_command
from sst2_xlmr.config import OPTIONS, Config, flag
from sst2_xlmr.data.prepare import Inputs, prepare
from sst2_xlmr.evaluation.metrics import describe_calibration
from sst2_xlmr.report.console import Report, header_lines
from sst2_xlmr.report.inputs import as_json, data_report, describe_rows, example_lines, input_lines
from sst2_xlmr.run import Run
from sst2_xlmr.task import LOWER_IS_BETTER
from sst2_xlmr.training.checkpoint import find_checkpoint, load_checkpoint, read_state
from sst2_xlmr.training.run_folder import evaluations_at, lock_run_folder, write_config
from sst2_xlmr.training.schedule import evaluation_interval
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.training.step import forward_backward
from sst2_xlmr.util.device import choose_precision, memory_errors, set_up_numerics, trim_malloc, tune_memory
from sst2_xlmr.util.distributed import World, broadcast, check_same, init_distributed, local_rank0_first, on_rank0
from sst2_xlmr.util.errors import Collapsed, Interrupted, raise_on_all, say
from sst2_xlmr.util.files import write_errors

FIXED_INPUTS = ("training rows", "file dev", "tokenizer", "encoder's weights")  # others may differ on resume


def train(run: Run) -> None:
    """Train until the schedule or early stopping ends the run.

    Raises Interrupted, Collapsed, or UserError for gradients that are not finite.
    """
    state, schedule = run.state, run.schedule
    run.ddp_model.train()
    for micro_batches in run.loader.starting_at(state.epoch, state.batch):  # global batches, epoch after epoch
        if schedule.is_over(state):
            break
        sums = forward_backward(run.ddp_model, micro_batches, run.task.loss, run.world)  # 1. the mean gradient
        grad_norm = run.optimizer.clip_grad_norm(run.config.max_grad_norm)
        if skipped := run.is_nonfinite(grad_norm):  # 2. one step, unless this batch is skipped
            run.check_skipped()
        else:
            run.optimizer.step(lr := schedule.lr(state.step))
            run.vocabulary.decay_unused_rows(lr)
            run.meter.add(sums, grad_norm, micro_batches)
        run.optimizer.zero_grad()
        run.advance(skipped)
        due, stop = schedule.due(state), run.stop_request.vote()  # a vote is a collective, so it is taken every step
        if due or stop:  # 3. log, evaluate, save
            run.meter.reduce(state.step)
            if "log" in due:
                run.log()
            state.evaluation_due = "evaluation" in due  # saved, so that a resumed run begins with it
            if stop:
                raise Interrupted
            run.evaluate_if_due()
            if "checkpoint" in due or schedule.is_over(state):  # also by this evaluation: early stopping
                run.save()
            run.meter.start()


def prepare_inputs(config: Config, world: World) -> tuple[Inputs, dict[str, str]]:
    """Load and tokenize the inputs; returns them and the SHA-256 of each, checked to be equal on all ranks."""
    inputs = local_rank0_first(world, lambda: prepare(config))
    trim_malloc()  # give back what tokenizing has used
    # --compile may change on resume, but all ranks of a run must agree on it.
    fixed = [name for name, option in OPTIONS.items() if name == "compile" or not option.metadata["changeable"]]
    fixed_options = {flag(name): getattr(config, name) for name in fixed}
    check_same(world, fixed_options, "start all with the same options")
    digests = inputs.digests() if world.local_rank == 0 else {}
    check_same(world, digests, "give all nodes the same files")
    return inputs, broadcast(world, digests)


def initial_state(inputs: Inputs, digests: dict[str, str], world: World) -> TrainState:
    """Return a new run's state; resolves `--precision auto`, as on rank 0, and the default of --eval-every."""
    config, rows, eval_every = inputs.config, inputs.caches["train"], inputs.config.eval_every
    precision = broadcast(world, choose_precision(config.precision, world.device))
    batches = math.ceil(len(rows) / config.batch_size)
    if eval_every is None:
        eval_tokens = sum(int(inputs.caches[split].lengths.sum()) for split in config.eval_splits)
        eval_every = evaluation_interval(batches, int(rows.lengths.sum()), eval_tokens)
    return TrainState(batches, precision, eval_every, digests)


def prepare_run(config: Config, resume: bool, world: World) -> tuple[Run, Path | None]:
    """Lock the run's folder, build the run, and restore its newest checkpoint, if any; returns run and checkpoint."""
    folder = Path(broadcast(world, config.output_dir or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}"))
    lock = checkpoint = None
    if resume:
        lock = on_rank0(world, lambda: lock_run_folder(folder))
        checkpoint = broadcast(world, on_rank0(world, lambda: find_checkpoint(folder / "checkpoints", say)))
    inputs, digests = prepare_inputs(config, world)
    state = read_state(checkpoint) if checkpoint else initial_state(inputs, digests, world)
    for name in FIXED_INPUTS:
        if digests[name] != state.digests.get(name):
            raise_on_all(f"{name}: changed since the run in {folder} was started; restore the original to resume")
    set_up_numerics(state.precision, config.deterministic, world.device)
    run = Run(inputs, folder, state, world)
    # A new run's folder is created only now, so that wrong input leaves nothing behind.
    run.lock = lock if resume else on_rank0(world, lambda: lock_run_folder(folder))
    if checkpoint:
        load_checkpoint(checkpoint, run.checkpoint_contents, config.seed, world)
        run.saved_step = state.step
    on_rank0(world, lambda: write_config(folder, config, is_new=not resume))  # from here on, --resume works
    return run, checkpoint


@contextlib.contextmanager
def run_context(run: Run, checkpoint: Path | None, resume: bool) -> Iterator[None]:
    """Open the run's outputs, print the header, and turn signals into stop requests; unlock the run at the end."""
    state, total_steps = run.state, run.schedule.total_steps
    best_splits = [f"best/{split}" for split in run.test_splits]
    rewritten_splits = [*run.test_splits, *best_splits, *(run.eval_splits if state.evaluation_due else [])]
    run.report = on_rank0(run.world, lambda: Report(run.inputs, state, run.folder, total_steps, rewritten_splits))
    if run.report:
        metrics = evaluations_at(run.folder / "metrics.jsonl", state.step)
        run.metrics = {split: metrics[split] for split in metrics if split not in best_splits}
        hardware = run.optimizer, run.fallback_reason, run.world
        run.say("\n".join(header_lines(run.inputs, state, total_steps, *hardware, run.head_is_new)))
        run.say(f"run        {run.folder}")
    if resume:
        run.say(f"resume     {f'from {checkpoint}' if checkpoint else 'no checkpoint yet: from the beginning'}")
    lock, report = (contextlib.closing(each) if each else contextlib.nullcontext() for each in (run.lock, run.report))
    with lock, run.background_writer, run.stop_request, report:
        yield


def finish(run: Run) -> None:
    """Evaluate on the test files, write the model, and print where it is."""
    state, folder, metric = run.state, run.folder, f"{run.best_split} {run.best_metric}"
    if run.schedule.has_stopped_improving(state):
        run.say(f"stopped early: {state.stale_evaluations} evaluations without a better {metric}")
    evaluations = {split: run.evaluate_split(split) for split in run.test_splits}
    run.log_evaluations(evaluations, state.temperature, plot=True)
    best_metrics = run.evaluate_best() if run.test_splits and state.best_step != state.step else {}
    run.write_report(Report.say_end, {**run.metrics, **best_metrics})
    run.export("model")
    run.ensure_checkpoint()
    if run.config.calibrate:
        run.say(f"calibrated {describe_calibration(state.temperature, state.ece_before, state.ece_after)}")
    chosen = f" (best of {state.evaluations} evaluations, slightly optimistic)" if state.evaluations > 1 else ""
    value = -state.best_score if run.best_metric in LOWER_IS_BETTER else state.best_score
    run.say(f"best       {metric} {value:.4f} at step {state.best_step}{chosen}: {folder / 'best'}")
    run.say(f"model      after step {state.step}: {folder / 'model'}")


def run_training(run: Run) -> None:
    """Train and finish; if a signal or a collapse ends the run early, save it and raise SystemExit."""
    resume_command = f"{train_command()} --resume --output-dir {shlex.quote(str(run.folder))}"
    try:
        if run.state.evaluation_due or run.state.collapse_check_due:  # since before a resume
            run.evaluate_if_due()
            run.save()
        with memory_errors(run.memory_fix):
            train(run)
        finish(run)
    except Interrupted:
        run.ensure_checkpoint()
        name = signal.Signals(run.stop_request.signal).name
        run.say(f"stopped    by {name} after step {run.state.step}, and saved; continue with")
        run.say(f"           {resume_command}")
        sys.exit(128 + run.stop_request.signal)  # as in shells
    except Collapsed as collapse:
        run.write_report(Report.log_collapse, run.state.step, str(collapse))
        run.save()  # even if this step has a checkpoint, in which the check is still due
        run.ensure_checkpoint()
        fix = f"--lr {run.config.lr / 2:g} --seed {run.config.seed + 1} --output-dir NEW_DIR"
        run.say("collapsed  training has collapsed; the run is saved. Rerun with a lower rate and another seed:")
        run.say(f"           {train_command()} --config {shlex.quote(str(run.folder / 'config.json'))} {fix}")
        sys.exit(1)


def describe_inputs(config: Config, world: World) -> None:
    """Print how all files are read and what the model will see, and write it as JSON."""
    inputs, _ = prepare_inputs(config, world)

    def write() -> None:
        lines = [*input_lines(inputs), *data_report(inputs), *example_lines(inputs)]
        say("\n".join([f"rows       {describe_rows(inputs)}", *lines]))
        path = Path(str(config.check))
        with write_errors(path):
            path.write_text(json.dumps(as_json(inputs), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    on_rank0(world, write)


def main(argv: list[str] | None = None) -> None:
    tune_memory()
    config, resume = parse_args(argv)
    too_large = "use a smaller --encoder, or a machine with more memory"
    with init_distributed(config.device, config.threads, config.timeout_minutes) as world, memory_errors(too_large):
        if config.check:
            describe_inputs(config, world)
            return
        run, checkpoint = prepare_run(config, resume, world)
        with run_context(run, checkpoint, resume):
            run_training(run)
