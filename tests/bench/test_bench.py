"""scripts/bench: bench.py on a tiny shape; studies with the Trainer, for which a program stands in."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Capture, Patch, Words, refusal, user_error
from running import call_in_forks

from sst2_xlmr.programs import export, study_runs

bench, inputs, runtimes, service = map(importlib.import_module, ("bench", "inputs", "runtimes", "service"))
with_trainer = importlib.import_module("study_with_trainer")


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    inputs.make_tokenizer(tmp_path / "tokenizer.model")
    fixed = ["--shape", "tiny", "--device", "cpu", "--precision", "fp32", "--rounds", 1, "--steps", 4]
    fixed += ["--warmup-steps", 2, "--batch-size", 4, "--tokenizer", tmp_path / "tokenizer.model"]
    return [str(option) for option in fixed]


def write_peer(file: Path, script: str) -> str:
    """Write what stands in for a peer's Python; $2 is its order, $3 gets its result."""
    file.write_text(script if script.startswith("#!") else f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(0o755)
    return str(file)


def test_rates_memory_and_ratios_of_training(options: list[str], tmp_path: Path, capfd: Capture) -> None:
    answer = json.dumps({"samples_per_s": 0.5, "tokens_per_s": 5.0, "versions": {"torch": "9"}})
    peer = write_peer(tmp_path / "python", f"cp $2 {tmp_path}/order.json; echo '{answer}' > $3")
    bench.main([*options, "--only", "train", "processes", "rows", "--peer", peer, "--processes", "2", "--rows", "100"])
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
def test_wrong_use_of_bench(more: list[str], expected: str, options: list[str]) -> None:
    assert expected in user_error(bench.main, [*options, *more])


def test_what_a_command_fails_with(tmp_path: Path) -> None:
    peer = write_peer(tmp_path / "python", "echo Traceback: >&2; echo 'No module named x' >&2; exit 1")
    assert user_error(bench.run_peer, peer, tmp_path, {}).endswith("peer.py failed: No module named x\n")


# As peer.py would, with accuracy 0.5.
PEER = f"""#!{sys.executable}
import json, sys
order = json.load(open(sys.argv[2]))
predictions = {{name: [[[0.0, 1.0], [0.0, 1.0]], [0, 1]] for name in order["splits"]}}
json.dump({{"order": order, "predictions": predictions}}, open(sys.argv[3], "w"))
"""


def test_the_trainers_results_are_those_of_the_same_files(
    train_words: Words, small_data: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    options = ["--seeds", "1", "--peer", str(write_peer(tmp_path / "python", PEER))]
    options += train_words(tmp_path / "all", "--epochs", 1)
    call_in_forks(with_trainer.main, *options)
    found = json.loads((tmp_path / "all" / "study.json").read_text())
    assert list(found["runs"]) == ["trainer", "ours"]
    assert found["runs"]["trainer"]["1"]["dev"] == found["runs"]["trainer"]["1"]["best dev"] == 0.5
    (tmp_path / "all" / "trainer" / "seed-1.seconds").unlink()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    call_in_forks(with_trainer.main, *options, "--output-dir", "all")  # another path of the same folder
    printed = capsys.readouterr().out
    assert printed.count("was finished") == 2
    assert "trainer, seed 1: was finished, dev 0.5000" in printed
    says = refusal(call_in_forks, with_trainer.main, *options, "--lr", "1e-4")
    assert "was made with other options; remove it, or choose another --output-dir" in says

    study_runs.digest.cache_clear()
    with (small_data / "dev.tsv").open("a") as file:
        file.write("one more\t0\n")
    says = refusal(call_in_forks, with_trainer.main, *options)
    assert "dev.tsv (dev) is not the file of the run " in says and "trainer/seed-1" in says
    study_runs.digest.cache_clear()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--peer", "nowhere/python"], "nowhere/python is not a program; give an environment's bin"),
        (["--peer", sys.executable, "--setting", "trainer", ""], "that name is taken"),
        (["--peer", sys.executable, "--max-steps", "9"], "the Trainer does not have --max-steps"),
    ],
)
def test_wrong_use(options: list[str], says: str, train_words: Words, tmp_path: Path) -> None:
    assert says in user_error(with_trainer.main, ["--seeds", "1", *train_words(tmp_path), *options])


def test_a_service_is_started_measured_and_ended(model: Path, monkeypatch: Patch, capsys: Capture) -> None:
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(sys, "argv", ["service.py", "--model", str(model), "--seconds", "1"])
    service.main()
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] > found["requests_per_s"] > 0
    assert 0 < found["p50_ms"] <= found["p99_ms"]


def test_other_runtimes_answer_every_row(model: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    pytest.importorskip("onnxruntime")
    ids, offsets = np.arange(10, 20), np.array([0, 5, 7, 10])
    batches = runtimes.batches(ids, offsets, 6)
    rows = [line[seen == 1].tolist() for batch in batches for line, seen in zip(*batch.values())]
    assert rows == [[10, 11, 12, 13, 14], [17, 18, 19], [15, 16]]
    assert [batch["input_ids"].shape for batch in batches] == [(1, 5), (2, 3)]

    np.savez(tmp_path / "rows.npz", eval_ids=ids, eval_offsets=offsets)
    onnx, result = tmp_path / "model.onnx", tmp_path / "result.json"
    export.main(["--model", str(model), "--format", "onnx", "--from-ids", "--output", str(onnx)])
    for precision in ("fp32", "int8"):
        order = {"runtime": "onnxruntime", "precision": precision, "onnx": str(onnx), "threads": 1}
        (tmp_path / "order.json").write_text(json.dumps({**order, "rows_file": str(tmp_path / "rows.npz")}))
        monkeypatch.setattr(sys, "argv", ["runtimes.py", str(tmp_path / "order.json"), str(result)])
        runtimes.main()
        found = json.loads(result.read_text())
        assert found["tokens_per_s"] == pytest.approx(found["samples_per_s"] * 10 / 3)
