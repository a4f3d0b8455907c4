"""scripts/bench/bench.py: the command line on a tiny shape, the arithmetic of its figures, its one-line errors."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SAMPLE_DATA, SST2, user_error

from sst2_xlmr.config import Config
from sst2_xlmr.model.encoders import EncoderShape

sys.path.insert(0, str(ROOT / "scripts" / "bench"))
bench, bench_worker, figures, many_rows, sampling, spec = (
    importlib.import_module(name) for name in ("bench", "worker", "figures", "many_rows", "sampling", "spec")
)

PEER = os.environ.get("SST2_XLMR_TEST_PEER")
STEPS, WARMUP_STEPS, BATCH_SIZE = 3, 1, 4


def quick_options(shape: Path, *options: Any) -> list[str]:
    """Return the options of a quick run; later options win."""
    fixed = ["--shape", shape, "--device", "cpu", "--threads", 1, "--no-compile", "--precision", "fp32", "--rounds", 1]
    fixed += ["--steps", STEPS, "--warmup-steps", WARMUP_STEPS, "--batch-size", BATCH_SIZE]
    return [str(option) for option in [*fixed, *options]]


def run_bench(capfd: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    bench.main(list(options))
    return json.loads(capfd.readouterr().out)


def write_interpreter(file: Path, script: str) -> Path:
    """Write what stands in for a peer's Python; it ignores what it is asked."""
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(0o755)
    return file


def test_a_figure_of_the_last_round_alone_is_summarized() -> None:
    """On a GPU, what the profiler counts is measured once."""
    found = figures.summarize([{"rate": 1.0, "gpu": "x"}, {"rate": 3.0, "gpu": "x", "launches": 7.0}])
    assert (found["rate"], found["launches"], found["gpu"]) == (2.0, 7.0, "x")
    assert (found["min"]["rate"], found["max"]["rate"]) == (1.0, 3.0)


def test_rates_phases_and_ratios(tiny_encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = {"samples_per_s": 0.5, "tokens_per_s": 5.0, "peak_rss_bytes": 1000, "versions": {"torch": "9"}}
    peer = write_interpreter(tmp_path / "python", f"echo '{json.dumps(answer)}'")
    out = tmp_path / "bench.json"
    result = run_bench(capfd, *quick_options(tiny_encoder, "--peer", peer, "--out", out))

    for task in ("train", "eval"):
        figures = result[task]
        assert figures["min"]["samples_per_s"] <= figures["samples_per_s"] <= figures["max"]["samples_per_s"]
        tokens_per_row = figures["tokens_per_s"] / figures["samples_per_s"]
        assert tokens_per_row == pytest.approx(figures["tokens_per_row"], rel=1e-3)
        rate = result["machine"]["fp32_gflop_per_s"]
        assert figures["utilisation"] == pytest.approx(figures["model_gflop_per_s"] / rate, rel=1e-3)
        assert 0 < figures["utilisation"] < 1
    assert result["train"]["computed_tokens_per_row"] > result["train"]["tokens_per_row"]
    phases = result["train"]["ms_per_step"]
    assert all(phases[phase] > 0 for phase in ("data", "forward", "backward", "step"))
    assert result["utilisation"] == result["train"]["utilisation"]
    assert result["peak_rss_bytes"] > 50e6  # torch alone is larger

    assert set(result["ratio"]) == {"padded", "dynamic", "grouped", "eval", "eval_bf16", "peak_rss"}
    for name, task in (("padded", "train"), ("dynamic", "train"), ("grouped", "train"), ("eval", "eval")):
        assert result["ratio"][name]["median"] == pytest.approx(result[task]["samples_per_s"] / 0.5, rel=1e-3)
    assert result["ratio"]["peak_rss"]["median"] == pytest.approx(result["peak_rss_bytes"] / 1000, rel=1e-3)
    assert result["peer"]["versions"] == {"torch": "9"}
    assert json.loads(out.read_text(encoding="utf-8")) == result


def test_a_ratio_is_taken_in_every_round() -> None:
    ours = [{"samples_per_s": rate} for rate in (10.0, 30.0, 20.0)]
    others = [{"samples_per_s": rate} for rate in (5.0, 10.0, 5.0)]
    assert figures.ratio(ours, others) == {"median": 3, "min": 2, "max": 4}


def test_needed_operations_by_hand() -> None:
    # Two layers, 2 wide, 3 in the feed-forward part; rows of 3 tokens and of 1. A product [1, 2] x [2, 2] is 8 FLOP.
    shape = EncoderShape(vocab_size=10, hidden=2, layers=2, heads=1, ffn=3)
    first = 4 * (4 * 8 + 2 * 12) + (36 + 36) + (4 + 4)  # 4 tokens: q k v o, up and down; 3 x 3 and 1 x 1 attention
    last = 4 * 2 * 8 + 2 * (2 * 8 + 2 * 12) + (12 + 12) + (4 + 4)  # 4 tokens: k v; 2 rows: q o, up, down; 1 x 3, 1 x 1
    head = 2 * (8 + 8)
    lengths = np.array([3, 1])
    assert bench_worker.model_flops(shape, lengths, num_labels=2, training=False) == first + last + head == 512
    assert bench_worker.model_flops(shape, lengths, num_labels=2, training=True) == 3 * 512


def test_ratio_of_processes(tiny_encoder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = quick_options(tiny_encoder, "--only", "processes", "--processes", "1,2", "--processes-batch-size", 6)
    result = run_bench(capfd, *options)["processes"]
    assert set(result) == {"1", "2", "ratio"}
    expected = result["2"]["samples_per_s"] / result["1"]["samples_per_s"]
    assert result["ratio"]["2"]["median"] == pytest.approx(expected, rel=1e-3)


def test_cold_and_warm_start_on_many_rows(tiny_encoder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = run_bench(capfd, *quick_options(tiny_encoder, "--only", "rows", "--rows", "100"))
    assert set(result["rows"]["100"]) == {"cold", "warm"}
    for figures in result["rows"]["100"].values():
        assert 0 < figures["first_step_s"] < figures["total_s"]
        assert figures["samples_per_s"] > 0 and figures["peak_rss_bytes"] > 50e6


def trainers_order(lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """The batches of the Trainer's `group_by_length` over a whole file: 50 batches sorted together, longest first."""
    rows = np.random.RandomState(1).permutation(len(lengths))
    groups = [rows[start : start + 50 * batch_size] for start in range(0, len(rows), 50 * batch_size)]
    order = np.concatenate([group[np.argsort(-lengths[group], kind="stable")] for group in groups])
    return order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)


def test_timed_batches_of_both_sides_stand_for_their_whole_order() -> None:
    """Real and computed tokens are those of an epoch, so neither side pads more or less than in real training."""
    lengths = np.random.RandomState(0).geometric(0.07, size=20_000) + 2
    config = Config(batch_size=16, seed=0)
    means = []
    for batches in (trainers_order(lengths, 16), spec.full_batches(lengths, config)):
        warmup, timed = sampling.choose_batches(batches, lengths, 3, 40)
        assert (warmup.shape, timed.shape) == ((3, 16), (40, 16))
        whole = {tuple(batch) for batch in batches.tolist()}
        assert {tuple(batch) for batch in [*warmup.tolist(), *timed.tolist()]} <= whole
        assert len({tuple(batch) for batch in timed.tolist()}) == 40
        means.append(lengths[timed].mean())
        for measure in (np.mean, lambda tokens: tokens.max(1).mean()):
            assert measure(lengths[timed]) == pytest.approx(measure(lengths[batches]), rel=0.03)
    assert means[0] == pytest.approx(means[1], rel=0.03)


def test_a_short_epoch_gives_batches_more_than_once() -> None:
    batches, lengths = np.arange(20).reshape(5, 4), np.arange(20)
    warmup, timed = sampling.choose_batches(batches, lengths, 2, 12)
    assert len(warmup) == 2 and len(timed) == 12
    assert {tuple(batch) for batch in timed.tolist()} == {tuple(batch) for batch in batches.tolist()}


def test_many_rows_are_new_and_as_long(tmp_path: Path) -> None:
    source, target = SAMPLE_DATA / "train.tsv", tmp_path / "many.tsv"
    many_rows.write_many_rows(source, target, 5000, seed=0)
    old, new = (file.read_text(encoding="utf-8").splitlines()[1:] for file in (source, target))
    assert len(new) == 5000 and len(set(new)) > 4500
    old_words, new_words = (np.mean([len(line.split()) for line in lines]) for lines in (old, new))
    assert new_words == pytest.approx(old_words, rel=0.03)


@pytest.mark.slow
@pytest.mark.skipif(not PEER, reason="SST2_XLMR_TEST_PEER names no Python that has transformers")
def test_the_peer_trains_on_rows_of_the_same_length(capfd: pytest.CaptureFixture[str]) -> None:
    """And pads more than we do, since no row of SST-2's is as long as another."""
    data = SST2 if SST2.is_dir() else SAMPLE_DATA
    options = ["--shape", "small", "--data-dir", str(data), "--steps", "20", "--rounds", "1", "--device", "cpu"]
    result = run_bench(capfd, *options, "--batch-size", "16", "--peer", str(PEER))
    ours = result["train"]
    for name in ("dynamic", "grouped"):
        figures = result["peer"][name]
        assert figures["tokens_per_row"] == pytest.approx(ours["tokens_per_row"], rel=0.05)
        assert figures["computed_tokens_per_row"] > ours["computed_tokens_per_row"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--shape", "xlmr.huge"], "--shape xlmr.huge: neither one of xlmr.base, xlmr.large, small nor a folder"),
        (["--data-dir", "nowhere"], "--data-dir nowhere is not a folder"),
        (["--tokenizer", "nowhere.model"], "no SentencePiece model nowhere.model"),
        (["--steps", "0"], "argument --steps: '0' is not a number from 1"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, not 0"),
        (["--rows", "10,many"], "argument --rows: 'many' is not a number from 1"),
        (["--only", "train,speed"], "argument --only: 'speed' is not one of train, eval, int8, processes, rows"),
        (["--only", "rows"], "--only rows needs --rows N,..."),
        (["--out", "nowhere/bench.json"], "--out nowhere/bench.json: its folder does not exist"),
        (["--peer", "nowhere/python"], "--peer nowhere/python: No such file or directory; give an environment's"),
    ],
)
def test_wrong_options(
    options: list[str], expected: str, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in user_error(lambda: bench.main(quick_options(tiny_encoder, *options)), capsys)


def test_what_a_peer_fails_with(tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = write_interpreter(tmp_path / "python", "echo Traceback: >&2; echo 'No module named x' >&2; exit 1")
    line = user_error(lambda: bench.main(quick_options(tiny_encoder, "--peer", peer)), capsys)
    assert line.endswith("cannot run versions: No module named x\n")


def test_a_folder_without_rows(tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = user_error(lambda: bench.main(quick_options(tiny_encoder, "--data-dir", tmp_path)), capsys)
    assert f"{tmp_path} has no train.tsv" in line
