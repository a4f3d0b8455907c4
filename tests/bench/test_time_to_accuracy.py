"""scripts/bench/time_to_accuracy.py, with a program that stands in for the Trainer."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, metrics, train_options, user_error

sys.path.insert(0, str(ROOT / "scripts" / "bench"))
time_to_accuracy = importlib.import_module("time_to_accuracy")

# As peer_training.py would: dev gets better at every evaluation; the order says how good in its seed, in hundredths.
PEER = """#!{python}
import json, sys, time
order = json.load(open(sys.argv[2]))
assert order["eval_every"] == 2, order
for step, accuracy in ((2, 0.3), (4, order["seed"] / 100)):
    time.sleep(0.2)
    with open(order["evaluations_file"], "a") as file:
        file.write(json.dumps({{"step": step, "split": "dev", "accuracy": accuracy}}) + chr(10))
time.sleep({then})
sys.exit({status})
"""


def write_peer(file: Path, then: float = 60, status: int = 0) -> Path:
    file.write_text(PEER.format(python=sys.executable, then=then, status=status))
    file.chmod(0o755)
    return file


def options_for(encoder: Path, data: Path, folder: Path, *more: object) -> list[str]:
    words = train_options(encoder, data, folder, "--epochs", 1, "--eval-every", 2, *more)
    return ["--output-dir", str(folder), *words[: (place := words.index("--output-dir"))], *words[place + 2 :]]


def test_seconds_ratios_and_what_was_not_reached(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The Trainer reaches it with seed 90 only, and would then sleep for a minute; every run of ours does."""
    more = ["--peer", write_peer(tmp_path / "python", then=0), "--setting", "ours", "--lr 2e-3"]
    options = ["--target", "0.4", "--seeds", "90,31", *options_for(tiny_encoder, small_data, tmp_path / "out", *more)]
    time_to_accuracy.main([str(option) for option in options])
    printed = capfd.readouterr()
    found: dict[str, Any] = json.loads(printed.out)
    assert found == json.loads((tmp_path / "out" / "time_to_accuracy.json").read_text())
    trainer, ours = found["seconds"]["trainer"], found["seconds"]["ours"]
    assert 0.4 < trainer["90"] < 10
    assert trainer["31"] is None
    assert "seed 31: trainer: best 0.3100, not reached" in printed.err
    assert found["reached"] == {"trainer": "1 of 2", "ours": "2 of 2"}
    assert found["median_seconds"]["trainer"] == trainer["90"]
    assert found["ratio"]["ours / trainer"]["median"] == pytest.approx(ours["90"] / trainer["90"], rel=1e-3)
    run = tmp_path / "out" / "ours" / "seed-90"
    assert json.loads((run / "config.json").read_text())["lr"] == 2e-3
    assert any(entry["accuracy"] >= 0.4 for entry in metrics(run) if entry.get("split") == "dev")


def test_a_command_ends_once_it_has_reached_the_target(tmp_path: Path) -> None:
    """Of what would take a minute; half a line, still being written, does no harm."""
    evaluations = tmp_path / "a" / "b" / "metrics.jsonl"
    line = json.dumps({"split": "dev", "accuracy": 0.5})
    script = f"import time; open({str(evaluations)!r}, 'w').write({line!r} + chr(10) + '{{'); time.sleep(60)"
    evaluations.parent.mkdir(parents=True)
    seconds = time_to_accuracy.seconds_to(0.5, [sys.executable, "-c", script], evaluations)
    assert seconds is not None
    assert seconds < 30


def test_a_failing_command_ends_it_with_its_status(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    peer = write_peer(tmp_path / "python", then=0, status=3)
    options = ["--target", "0.99", "--seeds", "5", "--peer", str(peer)]
    with pytest.raises(SystemExit) as stop:
        time_to_accuracy.main([*options, *options_for(tiny_encoder, small_data, tmp_path / "out")])
    assert stop.value.code == 3
    assert "seed-5.log:" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--target", "1.5"], "1.5 is not above 0 and at most 1"),
        (["--target", "much"], "invalid accuracy_to_reach value: 'much'"),
        ([], "required: --target"),
        (["--target", "0.5"], "is there; a time is measured from nothing"),
    ],
)
def test_wrong_use(options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*options, "--seeds", "1", "--output-dir", str(tmp_path)]
    assert says in user_error(lambda: time_to_accuracy.main(words), capsys)
