"""The report of a run: what is on the disk at once, and what other ranks say."""

from __future__ import annotations

import inspect
from pathlib import Path

from conftest import SAMPLE_DATA, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sst2_xlmr.config import Config
from sst2_xlmr.report.console import Report, SilentReport, open_report


def open_small_report(folder: Path) -> Report:
    config = Config(output_dir=str(folder), tensorboard_dir=str(folder / "events"))
    return open_report(config, {"dev": SAMPLE_DATA / "dev.tsv"}, 0, 10, [])


def test_a_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    """A killed process has no time to write what it holds back, and a resumed run does not repeat it."""
    report = open_small_report(tmp_path)
    report.log_training({"step": 1, "epoch": 0.1, "loss": 0.5, "lr": 1e-3, "samples_per_s": 1.0})
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1]
    assert metrics(tmp_path)[0]["loss"] == 0.5
    report.close()


def test_a_new_metric_of_training_needs_no_list(tmp_path: Path) -> None:
    report = open_small_report(tmp_path)
    entry = {"step": 3, "epoch": 0.1, "loss": 0.5, "lr": 1e-3, "samples_per_s": 1.0, "something_new": 7.0}
    report.log_training(entry)
    report.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert events.Scalars("train/something_new")[0].value == 7
    assert metrics(tmp_path) == [entry]


def test_a_silent_report_has_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, inspect.Signature]:
        functions = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(function) for name, function in functions if not name.startswith("_")}

    assert methods(SilentReport) == methods(Report)
