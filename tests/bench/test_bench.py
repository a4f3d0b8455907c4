"""scripts/bench/bench.py: the command line on a tiny shape, the arithmetic of its figures, its one-line errors."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from conftest import Capture, user_error

bench, inputs = (importlib.import_module(name) for name in ("bench", "inputs"))


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """A quick run's options; later ones win."""
    inputs.make_tokenizer(tmp_path / "tokenizer.model")
    fixed = ["--shape", "tiny", "--device", "cpu", "--precision", "fp32", "--rounds", 1, "--steps", 4]
    fixed += ["--warmup-steps", 2, "--batch-size", 4, "--tokenizer", tmp_path / "tokenizer.model"]
    return [str(option) for option in fixed]


def write_peer(file: Path, script: str) -> str:
    """Write what stands in for a peer's Python; $2 is its order, $3 gets its result."""
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(0o755)
    return str(file)


def test_rates_memory_and_ratios_of_training(options: list[str], tmp_path: Path, capfd: Capture) -> None:
    answer = json.dumps({"samples_per_s": 0.5, "tokens_per_s": 5.0, "versions": {"torch": "9"}})
    peer = write_peer(tmp_path / "python", f"cp $2 {tmp_path}/order.json; echo '{answer}' > $3")
    bench.main([*options, "--only", "train,processes,rows", "--peer", peer, "--processes", "2", "--rows", "100"])
    others = json.loads(capfd.readouterr().out)
    found = others.pop("train")
    assert list(found) == ["ratios", "ours", "trainer"]
    ours, beside = found["ours"], found["ratios"]["ours / trainer"]
    assert ours["tokens_per_s"]["median"] > 2 * ours["samples_per_s"]["median"] > 0
    assert ours["peak_rss_bytes"]["median"] > 50e6  # torch alone is larger
    assert beside["tokens_per_s"]["median"] == pytest.approx(ours["tokens_per_s"]["median"] / 5, rel=1e-3)
    assert beside["peak_rss_bytes"]["median"] >= 1
    assert found["trainer"]["versions"] == {"torch": "9"}
    order = json.loads((tmp_path / "order.json").read_text())
    assert (order["batches"], order["max_steps"], order["splits"]) == (50, 100, [])
    assert others["processes"]["2"]["samples_per_s"]["median"] > 0
    assert 0 < others["rows"]["100"]["warm"]["first_line_s"] < 120


def test_a_ratio_is_taken_in_every_round() -> None:
    ours = [{"samples_per_s": rate, "peak_rss_bytes": 4.0} for rate in (10.0, 30.0, 20.0)]
    others = [{"samples_per_s": rate, "peak_rss_bytes": 8.0} for rate in (5.0, 10.0, 5.0)]
    found = bench.ratios({"a": ours, "b": others})["a / b"]
    assert found["samples_per_s"] == {"median": 3, "min": 2, "max": 4}
    assert found["peak_rss_bytes"]["median"] == 0.5


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--shape", "xlmr.huge"], "invalid choice: 'xlmr.huge'"),
        (["--against", "nowhere"], "no file nowhere/train.py"),
        (["--warmup-steps", "3"], "--steps 4 is not a multiple of --warmup-steps 3"),
        (["--peer", "nowhere/python"], "nowhere/python is not a program; give an environment's bin/python"),
    ],
)
def test_wrong_options(more: list[str], expected: str, options: list[str], capsys: Capture) -> None:
    assert expected in user_error(lambda: bench.main([*options, *more]), capsys)


def test_what_a_command_fails_with(tmp_path: Path, capsys: Capture) -> None:
    peer = write_peer(tmp_path / "python", "echo Traceback: >&2; echo 'No module named x' >&2; exit 1")
    line = user_error(lambda: bench.run_peer(peer, tmp_path, {}), capsys)
    assert line.endswith("peer.py failed: No module named x\n")
