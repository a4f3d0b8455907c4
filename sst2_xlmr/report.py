"""What a run says: lines or a progress bar on the console, metrics.jsonl, TensorBoard. Only rank 0 says anything."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sst2_xlmr.config import Config, UserError
from sst2_xlmr.distributed import World
from sst2_xlmr.encoders import Encoder
from sst2_xlmr.files import write_text
from sst2_xlmr.optim import AdamW
from sst2_xlmr.token_cache import TokenCache


@dataclass
class Report:
    """Open outputs of a run; on other ranks than 0 all are None, and nothing is said.

    Attributes:
        metrics: `metrics.jsonl`, one JSON object a line.
        tensorboard: event writer.
        bar: tqdm's bar, on a terminal only.
        total_steps, started_at_step, started: for the time left (seconds of time.monotonic).
    """

    metrics: TextIO | None
    tensorboard: SummaryWriter | None
    bar: tqdm | None
    total_steps: int
    started_at_step: int
    started: float

    def close(self) -> None:
        """Close what is open."""
        if self.bar is not None:
            self.bar.close()
        if self.metrics is not None and self.tensorboard is not None:
            self.metrics.close()
            self.tensorboard.close()


def silent_report() -> Report:
    """Return the report of other ranks than 0."""
    return Report(None, None, None, 0, 0, 0.0)


def open_report(run_folder: Path, tensorboard_dir: Path, first_step: int, total_steps: int) -> Report:
    """Open the outputs; those of a resumed run lose what they say of steps after `first_step`.

    Raises:
        UserError: if they cannot be written.
    """
    try:
        path = run_folder / "metrics.jsonl"
        _cut_metrics(path, first_step)
        metrics = path.open("a", encoding="utf-8")
        tensorboard_dir.mkdir(parents=True, exist_ok=True)
        tensorboard = SummaryWriter(str(tensorboard_dir), purge_step=first_step + 1)
    except OSError as error:
        raise UserError(f"cannot write metrics to {error.filename or tensorboard_dir}: {error.strerror}") from None
    bar = None
    if sys.stderr.isatty():
        bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1)
    return Report(metrics, tensorboard, bar, total_steps, first_step, time.monotonic())


def _cut_metrics(path: Path, last_step: int) -> None:
    """Keep the lines up to a checkpoint's step; test results always come after it."""
    if not path.is_file():
        path.unlink(missing_ok=True)  # a link that leads nowhere would make a file elsewhere
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the process died while it wrote this line
            continue
        if entry["step"] <= last_step and entry.get("split", "dev") == "dev":
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def say(report: Report, text: str) -> None:
    """Print a line, above the bar if there is one."""
    if report.metrics is None:
        return
    if report.bar is not None:
        report.bar.write(text, file=sys.stdout)
    else:
        print(text, flush=True)


def describe_model(encoder: Encoder, optimizer: AdamW, table_rows: int) -> str:
    """Say the model's size, and how much of it is trained."""
    shape = encoder.shape
    whole = sum(slot.working.numel() for slot in optimizer.slots) + (shape.vocab_size - table_rows) * shape.hidden
    trained = sum(slot.working.numel() for slot, _, _ in optimizer.trained())
    rows = f" ({table_rows:,} of {shape.vocab_size:,} embedding rows occur)" if table_rows < shape.vocab_size else ""
    size = f"{shape.layers} layers, {shape.hidden} wide, {whole / 1e6:,.1f} M parameters"
    return f"{size}, {trained / 1e6:,.1f} M trained{rows}"


def describe_rows(caches: dict[str, TokenCache], max_length: int) -> str:
    """Say how many rows every file has, and how many are cut."""
    rows = ", ".join(f"{split} {len(cache):,}" for split, cache in caches.items())
    truncated = sum(cache.truncated for cache in caches.values())
    return rows + (f"; {truncated:,} cut to {max_length} tokens" if truncated else "")


def describe_batches(config: Config, batches: int, total_steps: int) -> str:
    """Say how the rows become steps."""
    cut = f" (at most {config.micro_batch_size} a pass)" if config.micro_batch_size else ""
    epochs = "" if config.max_steps else f"{config.epochs} epoch{'s' * (config.epochs > 1)}, "
    return f"{batches:,} an epoch, of {config.batch_size} rows{cut}; {epochs}{total_steps:,} steps"


def describe_device(world: World) -> str:
    """Say what computes, and how many processes of it there are."""
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    else:
        device = f"CPU with {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    return f"{device}, {world.world_size} process{'es' * (world.world_size > 1)}"


def advance(report: Report) -> None:
    """Move the bar by one step."""
    if report.bar is not None:
        report.bar.update()


def _write(report: Report, entry: dict[str, Any], prefix: str) -> None:
    assert report.metrics is not None and report.tensorboard is not None
    with _writing(report):
        report.metrics.write(json.dumps(entry) + "\n")
        report.metrics.flush()
        for key, value in entry.items():
            if key not in ("step", "epoch", "split", "rows"):
                report.tensorboard.add_scalar(f"{prefix}/{key}", value, entry["step"])


@contextlib.contextmanager
def _writing(report: Report) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        assert report.metrics is not None
        raise UserError(
            f"cannot write metrics to {report.metrics.name}: {error.strerror}; make room and continue with --resume"
        ) from None


def log_training(report: Report, entry: dict[str, Any]) -> None:
    """Write a line of training metrics.

    Args:
        entry: step, epoch (with fraction), loss, lr, grad_norm, samples_per_s, tokens_per_s.
    """
    if report.metrics is None:
        return
    _write(report, entry, "train")
    if report.bar is not None:
        report.bar.set_postfix_str(f"loss {entry['loss']:.4f}, {entry['samples_per_s']:.0f} samples/s")
        return
    done = entry["step"] - report.started_at_step
    left_s = (time.monotonic() - report.started) / max(1, done) * (report.total_steps - entry["step"])
    say(
        report,
        f"step {entry['step']:>6}/{report.total_steps}  epoch {entry['epoch']:.2f}  loss {entry['loss']:.4f}  "
        f"lr {entry['lr']:.2e}  {entry['samples_per_s']:.1f} samples/s  {_clock(left_s)} left",
    )


def log_evaluation(report: Report, step: int, split: str, metrics: dict[str, Any], remark: str = "") -> None:
    """Write a line of evaluation metrics: loss, accuracy, macro_f1, rows."""
    if report.metrics is None:
        return
    _write(report, {"step": step, "split": split, **metrics}, split)
    say(
        report,
        f"step {step:>6}  {split}: accuracy {metrics['accuracy']:.4f}  macro F1 {metrics['macro_f1']:.4f}  "
        f"loss {metrics['loss']:.4f}  {metrics['rows']:,} rows{remark}",
    )


def log_save(report: Report, step: int, saved: tuple[int, float] | None) -> None:
    """Say what a checkpoint took.

    Args:
        saved: bytes written, and the seconds that training waited for it.
    """
    if saved is not None:
        say(report, f"step {step:>6}  checkpoint: {saved[0] / 1e6:,.0f} MB, training waited {saved[1]:.1f} s")


def sync_report(report: Report) -> None:
    """Bring all that was logged to the disk, so that no checkpoint is ahead of it."""
    if report.metrics is not None and report.tensorboard is not None:
        with _writing(report):
            os.fsync(report.metrics.fileno())
            report.tensorboard.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
