"""The folder of TensorBoard's event files: one run to a folder, and what a resumed run keeps of them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from sst2_xlmr.config import Config
from sst2_xlmr.report.tensorboard import TABLE_TAG
from sst2_xlmr.util.errors import UserError

EVENTS_PREFIX = "events.out.tfevents."  # SummaryWriter's
OWNER_NAME = "run.txt"  # in an event folder outside the run's own: the path of the run that it belongs to


def event_files(folder: Path) -> list[Path]:
    """Return the event files in a folder, in the order in which TensorBoard reads them."""
    return sorted(folder.glob(f"{EVENTS_PREFIX}*"))


def event_folder(config: Config) -> Path:
    """Return the folder for a run's events; `config.output_dir` must be set."""
    assert config.output_dir is not None
    return Path(config.tensorboard_dir or Path(config.output_dir) / "tensorboard")


def make_event_folder(folder: Path) -> None:
    """Make a folder for new events; TensorBoard would mix them with those of another run.

    Raises:
        UserError: if it has events already, or cannot be made.
    """
    if event_files(folder):
        raise UserError(f"{folder} has events of another run; take another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; take another folder") from None


def claim_event_folder(config: Config, resume: bool) -> None:
    """Reserve the folder for a run's events, so that a resumed run never cuts another run's.

    A folder inside the run's own goes with that and is left alone: nothing may be made there before the run's folder is
    claimed. In any other a file names the run, from before its first event on. The path in `config.json` would not do:
    a copied run has the same, and two runs that start at the same time find the folder empty, both of them.

    Raises:
        UserError: if the folder belongs to another run, or cannot be written.
    """
    assert config.output_dir is not None
    folder, run_folder = event_folder(config), os.path.realpath(config.output_dir)
    # By its name or in fact: a link out of the run's folder is refused when that is claimed.
    inside = [path(folder) for path in (os.path.abspath, os.path.realpath)]
    outer = (os.path.abspath(config.output_dir), run_folder)
    if any(Path(path).is_relative_to(parent) for path, parent in zip(inside, outer)):
        return
    owner_file = folder / OWNER_NAME
    if not (resume and owner_file.is_file()):
        make_event_folder(folder)
    try:
        # What is appended in one write stays whole: of two runs that start at the same time, the first line decides.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with os.fdopen(os.open(owner_file, flags, 0o666), "r+", encoding="utf-8") as opened:
            if not opened.read(1):
                opened.write(f"{run_folder}\n")
                opened.flush()
            opened.seek(0)
            owner = opened.readline().rstrip("\n")
    except OSError as error:
        raise UserError(f"cannot write to {owner_file}: {error.strerror}; take another --tensorboard-dir") from None
    if owner != run_folder:
        raise UserError(
            f"{folder} belongs to the run in {owner} ({OWNER_NAME} says so); take another --tensorboard-dir"
        )


def cut_events(folder: Path, last_step: int, written_again: list[str]) -> None:
    """Remove from a folder's events what a run that goes on after `last_step` will write.

    SummaryWriter's `purge_step` only asks TensorBoard to hide it, and TensorBoard's default data server hides points
    only of tags that are written again. TensorBoard reads files in the order of their names, which begin with the
    second of the start; if a new one would not be the last (a start in the same second, or on a node whose clock is
    behind), the others are renamed.

    Args:
        written_again: splits that will be evaluated (once more) at `last_step`.

    Raises:
        OSError: if they cannot be written.
    """
    prefixes = (TABLE_TAG, *(f"{split}/" for split in written_again))

    def is_kept(tag: str, step: int) -> bool:
        is_written_again = tag.startswith("_hparams_") or (step == last_step and tag.startswith(prefixes))
        return step <= last_step and not is_written_again

    files = event_files(folder)
    if files and files[-1].name >= f"{EVENTS_PREFIX}{int(time.time()):010}":
        files = [file.rename(folder / f"{EVENTS_PREFIX}{number:010}") for number, file in enumerate(files)]
    for file in files:
        cut_file = folder / "cut.tmp"  # TensorBoard reads all that has "tfevents" in its name
        cut_file.unlink(missing_ok=True)
        with cut_file.open("xb") as opened:
            records = RecordWriter(opened)
            for record in RawEventFileLoader(str(file)).Load():  # ends before a record that was not written whole
                event = Event.FromString(record)
                values = [value for value in event.summary.value if is_kept(value.tag, event.step)]
                if values:
                    del event.summary.value[:]
                    event.summary.value.extend(values)
                if values or not event.HasField("summary"):
                    records.write(event.SerializeToString())
            records.flush()
        cut_file.replace(file)
