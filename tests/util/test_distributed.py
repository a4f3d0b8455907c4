"""What several processes do with a broken environment, or when the memory of one of them is full."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Patch, Words, train_options
from running import run_ranks

from sst2_xlmr import run, train
from sst2_xlmr.report.console import Report
from sst2_xlmr.util.distributed import _agree_on_device, init_distributed
from sst2_xlmr.util.errors import UserError

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "x"}, "has RANK=x, but"),
        ({"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "has RANK=3, WORLD_SIZE=2, "),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "has WORLD_SIZE=2, "),
        ({**TORCHRUN, "MASTER_ADDR": "", "MASTER_PORT": "29500"}, "MASTER_PORT=29500, MASTER_ADDR=, but"),
        (TORCHRUN, "but a RANK below WORLD_SIZE, MASTER_ADDR and MASTER_PORT are needed"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ],
)
def test_a_broken_environment_is_refused(variables: dict[str, str], says: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "environ", {**{n: v for n, v in os.environ.items() if "RANK" not in n}, **variables})
    with pytest.raises(UserError, match="^the environment has ") as error, init_distributed("cpu", 1, 1):
        pass
    assert says in str(error.value) and error.value.on_this_rank


CUDA_FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:83] DefaultCPUAllocator: can't allocate memory: you")


@pytest.mark.parametrize(
    ("processes", "place", "error", "says"),
    [
        (1, (train, "forward_backward"), CUDA_FULL, "CUDA out of memory: rerun with --micro-batch-size 4 or less"),
        (1, (run, "evaluate"), CUDA_FULL, "CUDA out of memory: rerun with --eval-batch-tokens 1024 or less"),
        (2, (train, "forward_backward"), CPU_FULL, "out of memory (rank 1): rerun with --micro-batch-size 2"),
    ],
)
def test_the_rank_whose_memory_is_full_says_so(
    train_words: Words, tmp_path: Path, monkeypatch: Patch, processes: int, place: Any, error: Any, says: str
) -> None:
    real = getattr(*place)

    def full_on_the_last_rank(*arguments: Any, **named: Any) -> Any:
        if os.environ.get("RANK", "0") == str(processes - 1):
            raise error
        return real(*arguments, **named)

    monkeypatch.setattr(place[0], place[1], full_on_the_last_rank)
    statuses, _, errors = run_ranks(processes, train_words(tmp_path / "run", "--epochs", 1), tmp_path)
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ") and "lost contact" not in line]
    assert says in line
    assert statuses == ([2] if processes == 1 else [1, 2])
    assert "Traceback" not in errors


def test_an_error_of_rank_0s_report_reaches_all_ranks(train_words: Words, tmp_path: Path, monkeypatch: Patch) -> None:
    """A disk that is full for metrics: one line, and nobody has lost contact."""
    real = Report.log_training

    def full(report: Report, entry: Any) -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), report._metrics.fileno())
        real(report, entry)

    monkeypatch.setattr(Report, "log_training", full)
    statuses, _, errors = run_ranks(2, train_words(tmp_path / "run", "--epochs", 1), tmp_path)
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert "cannot write metrics to " in errors and "No space left on device" in errors
    assert statuses == [2, 2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--lr 2e-3", "rank 1 has --lr 0.002, rank 0 0.001; start all with the same options"),
        ("--no-compile", "rank 1 has --compile False, rank 0 True"),  # though a resumed run may compute otherwise
        ("a row more", "rank 1 has training rows "),
    ],
)
def test_ranks_with_other_options_or_files_are_refused(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, monkeypatch: Patch, change: str, says: str
) -> None:
    """Every rank as if on a node of its own, in a folder of its own; for other files see test_state.py."""
    for node in ("0", "1"):
        shutil.copytree(tiny_encoder, tmp_path / node / "encoder")
        shutil.copytree(small_data, tmp_path / node / "data")
    options = change.split() if change.startswith("--") else []
    if not options:
        with (tmp_path / "1" / "data" / "train.tsv").open("a") as file:
            file.write("one row more\t1\n")
    real = train.main

    def main_on_its_node(words: list[str]) -> None:
        os.chdir(tmp_path / os.environ["RANK"])
        real([*words, *(options if os.environ["RANK"] == "1" else [])])

    monkeypatch.setattr(train, "main", main_on_its_node)
    words = train_options(Path("encoder"), Path("data"), tmp_path / "run")
    statuses, _, errors = run_ranks(2, words, tmp_path, nodes=True)
    assert errors.count("error: ") == 1 and says in errors
    assert statuses == [2, 2]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("asked", ["auto", "cpu", "cuda"])
@pytest.mark.parametrize(("first", "mine"), [(True, True), (True, False), (False, True), (False, False)])
def test_rank_0_decides_what_auto_means(monkeypatch: Patch, asked: str, first: bool, mine: bool) -> None:
    """For all: a node without a GPU says so, and one with a GPU computes on its CPU if rank 0 does."""
    store = dist.HashStore()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: first)
    agreed = _agree_on_device("auto", 0, store)
    assert agreed == ("cuda" if first else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: mine)
    if asked == agreed or (asked == "auto" and (mine or not first)):
        assert _agree_on_device(asked, 1, store) == agreed
    else:
        with pytest.raises(UserError, match=f"rank 1 would compute on .*, but rank 0 on {agreed}; give all") as error:
            _agree_on_device(asked, 1, store)
        assert error.value.on_this_rank
