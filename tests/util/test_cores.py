"""Threads are as many as the container and the job may use; precision by device, determinism (GPUs are pretended)."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Patch

from sst2_xlmr.util.cores import available_cores, limit_threads, yield_busy_cores
from sst2_xlmr.util.device import choose_precision, set_up_numerics
from sst2_xlmr.util.distributed import thread_count

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _many_cores(monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for name in ("SLURM_CPUS_ON_NODE", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("2:cpu,cpuacct:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 1),
        ("2:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 16),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 16),
        ("damaged", {}, 16),
    ],
)
def test_a_quota_is_rounded_up(tmp_path: Path, own: str, files: dict[str, str], cores: int) -> None:
    for name, content in {**{f"root/{name}": content for name, content in files.items()}, "own": own}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert available_cores(tmp_path / "root", tmp_path / "own") == cores


def test_torch_starts_no_more_threads_than_the_container_has_cores(monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for cores, given, expected in ((3, {}, "3"), (16, {}, None), (3, {"OMP_NUM_THREADS": "8"}, "8")):
        environment: dict[str, str] = dict(given)
        monkeypatch.setattr(os, "environ", environment)
        monkeypatch.setattr("sst2_xlmr.util.cores.available_cores", lambda cores=cores: cores)
        limit_threads()
        assert environment.get("OMP_NUM_THREADS") == expected


def test_slurms_allocation_and_the_users_omp_num_threads_win(monkeypatch: Patch, tmp_path: Path) -> None:
    none = tmp_path / "none"
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "6")
    assert available_cores(none, none) == 6
    monkeypatch.setattr("sst2_xlmr.util.distributed.available_cores", lambda: 6)
    assert [thread_count(0, processes) for processes in (2, 9)] == [3, 1]
    assert thread_count(0, 1) <= 6
    assert thread_count(5, 2) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert thread_count(0, 2) == 4
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert thread_count(0, 2) == 3, "which torchrun has set"


@pytest.mark.parametrize(("load", "spins"), [("0 0 0 3/90 7", "0"), ("9 9 9 1/90 7", None), ("", None)])
def test_threads_sleep_where_others_use_cores(monkeypatch: Patch, tmp_path: Path, load: str, spins: str | None) -> None:
    (tmp_path / "loadavg").write_text(load)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for own, expected in (({}, spins), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)):
        environment: dict[str, str] = dict(own)
        monkeypatch.setattr(os, "environ", environment)
        yield_busy_cores(tmp_path / "loadavg")
        assert environment.get("GOMP_SPINCOUNT") == expected


@pytest.fixture
def _undo(monkeypatch: Patch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_auto_is_bf16_where_the_gpu_has_it(monkeypatch: Patch) -> None:
    for capability, expected in (((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert (choose_precision("auto", CUDA), choose_precision("bf16", CUDA)) == (expected, "bf16")


@pytest.mark.usefixtures("_undo")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("precision", "expected"), [("fp32", "highest"), ("tf32", "high")])
def test_numerics_are_those_that_were_asked_for(precision: str, expected: str, deterministic: bool) -> None:
    set_up_numerics(precision, deterministic, CUDA)
    assert torch.get_float32_matmul_precision() == expected
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
