"""Checkpoints: what is written, found, refused and removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sst2_xlmr.config import Config
from sst2_xlmr.distributed import World
from sst2_xlmr.errors import UserError
from sst2_xlmr.files import Finisher
from sst2_xlmr.model.classifier import Classifier
from sst2_xlmr.model.encoders import EncoderShape
from sst2_xlmr.training.checkpoint import (
    Progress,
    find_checkpoint,
    load_checkpoint,
    load_progress,
    save_checkpoint,
    what_is_damaged,
)
from sst2_xlmr.training.optimizer import AdamW

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
IDS = torch.arange(50)


def optimizer(seed: int, vocab_size: int = 50) -> AdamW:
    torch.manual_seed(seed)
    model = Classifier(EncoderShape(vocab_size, hidden=8, layers=1, heads=2, ffn=16, positions=20), 2, 0.0, 0.0)
    result = AdamW(model, 1, 0.01, 1.0, 1.0, bf16=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    result.step(0.1, result.gradient_norm())
    return result


def save(folder: Path, step: int, seed: int = 0) -> AdamW:
    saved = optimizer(seed)
    progress = Progress("x", "y", step=step, epoch=1, batch=3, table_decay=saved.table_decay)
    with Finisher() as finisher:
        save_checkpoint(folder, progress, saved, IDS, Config(), ALONE, finisher)
    return saved


def test_everything_comes_back(tmp_path: Path) -> None:
    saved = save(tmp_path, 7)
    expected = torch.rand(5)  # the numbers that come after the save
    checkpoint = find_checkpoint(tmp_path, pytest.fail)
    assert checkpoint is not None
    progress = load_progress(checkpoint)
    assert (progress.step, progress.epoch, progress.batch) == (7, 1, 3)
    loaded = optimizer(1)
    load_checkpoint(checkpoint, progress, loaded, IDS, 0, ALONE)
    assert (loaded.steps, loaded.table_decay) == (7, saved.table_decay)
    for mine, other in zip(loaded.slots, saved.slots):
        assert torch.equal(mine.master(), other.master())
        assert torch.equal(mine.working, other.working)
    for name, tensor in saved.state_tensors().items():
        assert torch.equal(loaded.state_tensors()[name], tensor)
    assert torch.equal(torch.rand(5), expected)
    assert sorted(f.name for f in checkpoint.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "progress.json",
        "random.safetensors",
        "vocabulary.safetensors",
    ]
    modes = {file.stat().st_mode & 0o777 for file in checkpoint.iterdir()}
    assert len(modes) == 1, "others can read some of the files only"


def test_other_vocabulary_keeps_what_was_trained(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    checkpoint = tmp_path / "step-00000001"
    wider = optimizer(1, vocab_size=60)
    ids = torch.cat([torch.arange(30), torch.arange(35, 65)])
    name = "encoder.transformer.token_embedding.weight"
    new_row = wider.master_tensors()[name][-1].clone()
    load_checkpoint(checkpoint, load_progress(checkpoint), wider, ids, 0, ALONE)
    table = wider.master_tensors()[name]
    assert torch.equal(table[:30], saved.master_tensors()[name][:30])
    assert torch.equal(table[30:45], saved.master_tensors()[name][35:])
    torch.testing.assert_close(table[-1], new_row * saved.table_decay)
    assert not wider.state_tensors()[f"exp_avg.{name}"][45:].any()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", "flip"),
        ("model.safetensors", "cut"),
        ("optimizer.safetensors", "remove"),
        ("random.safetensors", "flip"),
        ("progress.json", "flip"),
        ("manifest.json", "cut"),
        ("manifest.json", "remove"),
    ],
)
def test_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    target = tmp_path / "step-00000002" / file
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        target.unlink()
    else:
        target.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    said: list[str] = []
    assert find_checkpoint(tmp_path, said.append) == tmp_path / "step-00000001"
    assert len(said) == 1
    assert "step-00000002" in said[0]
    assert file in said[0]


def test_unfinished_checkpoint_does_not_exist(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.tmp")
    assert find_checkpoint(tmp_path, pytest.fail) is None


def test_oldest_are_removed(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    assert all(not what_is_damaged(entry) for entry in tmp_path.iterdir())


def test_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 1)
    second = save(tmp_path, 1, seed=5)
    loaded = optimizer(9)
    load_checkpoint(tmp_path / "step-00000001", Progress("x", "y"), loaded, IDS, 0, ALONE)
    assert torch.equal(loaded.slots[0].master(), second.slots[0].master())


def test_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save(tmp_path / "checkpoints", 1)


def test_manifest_names_size_and_digest(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    assert set(manifest) == {f.name for f in (tmp_path / "step-00000001").iterdir()} - {"manifest.json"}
    assert all(len(facts["sha256"]) == 64 and facts["bytes"] > 0 for facts in manifest.values())
