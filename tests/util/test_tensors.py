"""Tensors on disk: the same as safetensors writes, without having them in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sst2_xlmr.util import tensors as tensor_files
from sst2_xlmr.util.tensors import LazyTensor, write_tensors

TENSORS = {
    "b.matrix": torch.randn(7, 5),
    "a.vector": torch.randn(3).bfloat16(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "ids": torch.arange(4),
    'half \u00e9"': torch.randn(2, 3, 3).half(),
    "number": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4),
    "turned": torch.randn(4, 6).t(),
}


def deferred(tensor: torch.Tensor, asked: list[int]) -> LazyTensor:
    def rows(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return tensor[start:stop]

    return LazyTensor(tuple(tensor.shape), tensor.dtype, rows)


def test_same_content_as_safetensors_own(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_tensors(TENSORS, ours)
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, theirs, {"format": "pt"})
    found, expected = load_file(ours), load_file(theirs)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with safe_open(ours, "pt") as mine, safe_open(theirs, "pt") as other:
        assert mine.metadata() == other.metadata()
    assert ours.stat().st_size == theirs.stat().st_size


def test_deferred_tensors_are_made_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "_CHUNK_BYTES", 60)
    whole, asked = torch.randn(30, 5), list[int]()
    thirds = deferred(whole, asked).chunk(3)
    write_tensors({"whole": deferred(whole, asked), **dict(zip("abc", thirds))}, tmp_path / "x")
    assert set(asked) == {3, 1}
    found = load_file(tmp_path / "x")
    assert torch.equal(found["whole"], whole)
    assert torch.equal(torch.cat([found[name] for name in "abc"]), whole)
