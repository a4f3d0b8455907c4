"""scripts/bench/bench.py: the command line on a tiny shape, the arithmetic of its figures, its one-line errors."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SAMPLE_DATA, SST2, user_error

from sst2_xlmr.programs import evaluate, predict

sys.path.insert(0, str(ROOT / "scripts" / "bench"))
bench, inputs = (importlib.import_module(name) for name in ("bench", "inputs"))
PEER = os.environ.get("SST2_XLMR_TEST_PEER")


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


def test_rates_memory_and_ratios_of_training(
    options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = json.dumps({"samples_per_s": 0.5, "tokens_per_s": 5.0, "versions": {"torch": "9"}})
    peer = write_peer(tmp_path / "python", f"cp $2 {tmp_path}/order.json; echo '{answer}' > $3")
    bench.main([*options, "--only", "train", "--plain", "--against", str(ROOT), "--peer", peer])
    found = json.loads(capfd.readouterr().out)["train"]
    names = ["ours", "plain", "against", "against-plain", "trainer"]
    assert list(found) == ["ratios", *names]
    assert len(found["ratios"]) == 10
    ours, beside = found["ours"], found["ratios"]["ours / trainer"]
    assert ours["tokens_per_s"]["median"] > 2 * ours["samples_per_s"]["median"] > 0
    assert ours["peak_rss_bytes"]["median"] > 50e6  # torch alone is larger
    assert beside["tokens_per_s"]["median"] == pytest.approx(ours["tokens_per_s"]["median"] / 5, rel=1e-3)
    assert beside["peak_rss_bytes"]["median"] > 1
    assert found["trainer"]["versions"] == {"torch": "9"}
    order = json.loads((tmp_path / "order.json").read_text())
    assert (order["batches"], order["max_steps"], order["splits"]) == (50, 100, [])


def test_starting_on_many_rows_and_with_processes(options: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    bench.main([*options, "--only", "processes,rows", "--processes", "2", "--rows", "100"])
    found = json.loads(capfd.readouterr().out)
    assert found["processes"]["2"]["samples_per_s"]["median"] > 0
    for figures in (found["rows"]["100"][state] for state in ("cold", "warm")):
        assert 0 < figures["first_line_s"] < 120
        assert figures["peak_rss_bytes"] > 50e6


def test_a_ratio_is_taken_in_every_round() -> None:
    ours = [{"samples_per_s": rate, "peak_rss_bytes": 4.0} for rate in (10.0, 30.0, 20.0)]
    others = [{"samples_per_s": rate, "peak_rss_bytes": 8.0} for rate in (5.0, 10.0, 5.0)]
    found = bench.ratios({"a": ours, "b": others})["a / b"]
    assert found["samples_per_s"] == {"median": 3, "min": 2, "max": 4}
    assert found["peak_rss_bytes"]["median"] == 0.5


def test_evaluation_and_prediction_without_the_time_to_start(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, str]] = []

    def run(command: list[str], environment: dict[str, str]) -> dict[str, float]:
        assert environment["PYTHONPATH"].startswith(str(ROOT))
        _, program, *words = command
        parsed = (predict if "predict" in program else evaluate).parse_args(words)
        commands.append((Path(program).stem, parsed.precision))
        return {"seconds": 3.0 if "eval.tsv" in " ".join(command) else 1.0, "peak_rss_bytes": 7}

    monkeypatch.setattr(bench, "run", run)
    arguments = bench.parse_args([*options, "--only", "int8,predict", "--eval-rows", "108"])
    bench.write_inputs(arguments, tmp_path)
    assert len(inputs.read_rows(tmp_path / "eval.tsv")) == 108
    for task, names in (("int8", {"int8", "ours"}), ("predict", {"ours"})):
        contenders = bench.contenders(arguments, tmp_path, task)
        assert set(contenders) == names
        for measure in contenders.values():
            assert measure() == {"samples_per_s": 50.0, "peak_rss_bytes": 7}
    expected = [("evaluate", "int8"), ("evaluate", "fp32"), ("predict", "fp32")]
    assert commands == [command for command in expected for _ in range(3)]
    monkeypatch.setattr(bench, "run", lambda *_: {"seconds": 1.0})
    with pytest.raises(Exception, match="--eval-rows 108 took no longer than 8: give more"):
        measure()


def test_rows_are_as_long_as_those_that_they_are_made_of(tmp_path: Path) -> None:
    source = SAMPLE_DATA / "train.tsv"
    inputs.write_many_rows(source, tmp_path / "many.tsv", 5000, seed=0)
    inputs.write_typical_rows(source, tmp_path / "typical.tsv", 100)
    old, many, typical = (inputs.read_rows(file) for file in (source, tmp_path / "many.tsv", tmp_path / "typical.tsv"))
    assert (len(many), len(typical)) == (5000, 100)
    assert len(set(many)) > 4500, "nearly all are new"
    assert set(typical) < set(old)
    words, *others = (np.mean([len(line.split()) for line in lines]) for lines in (old, many, typical))
    assert others == pytest.approx([words, words], rel=0.03)


@pytest.mark.slow
@pytest.mark.skipif(not PEER, reason="SST2_XLMR_TEST_PEER names no Python that has transformers")
def test_beside_the_trainer(options: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    data = SST2 if SST2.is_dir() else SAMPLE_DATA
    more = ["--data-dir", str(data), "--only", "train,eval,int8", "--eval-rows", "4000", "--peer", str(PEER)]
    bench.main([*options, *more])
    found = json.loads(capfd.readouterr().out)
    for name, task in (("trainer", "train"), ("trainer", "int8"), ("trainer-fp32", "int8"), ("ours", "int8")):
        assert found[task][name]["samples_per_s"]["median"] > 0
    lengths = [found["train"][side]["tokens_per_s"] for side in ("ours", "trainer")]
    rates = [found["train"][side]["samples_per_s"] for side in ("ours", "trainer")]
    ours, trainers = (tokens["median"] / rate["median"] for tokens, rate in zip(lengths, rates))
    assert ours == pytest.approx(trainers, rel=0.5), "few batches, but of rows of the same file"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--shape", "xlmr.huge"], "invalid choice: 'xlmr.huge'"),
        (["--data-dir", "nowhere"], "no file nowhere/train.tsv; see --tokenizer, --data-dir and --against"),
        (["--tokenizer", "nowhere.model"], "no file nowhere.model"),
        (["--against", "nowhere"], "no file nowhere/train.py"),
        (["--steps", "0"], "argument --steps: '0' is not a number from 1"),
        (["--warmup-steps", "3"], "--steps 4 is not a multiple of --warmup-steps 3"),
        (["--rows", "10,many"], "argument --rows: 'many' is not a number from 1"),
        (
            ["--only", "train,speed"],
            "argument --only: 'speed' is not one of train, eval, predict, int8, processes, rows",
        ),
        (["--peer", "nowhere/python"], "nowhere/python is not a program; give an environment's bin/python"),
    ],
)
def test_wrong_options(more: list[str], expected: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in user_error(lambda: bench.main([*options, *more]), capsys)


def test_what_a_command_fails_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = write_peer(tmp_path / "python", "echo Traceback: >&2; echo 'No module named x' >&2; exit 1")
    line = user_error(lambda: bench.run_peer(peer, tmp_path, {}), capsys)
    assert line.endswith("peer.py failed: No module named x\n")
