"""Checkpoints: what is written, found, refused and removed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sst2_xlmr.config import Config
from sst2_xlmr.model.classifier import Classifier
from sst2_xlmr.model.encoders import EncoderShape
from sst2_xlmr.training.checkpoint import (
    RunState,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    what_is_damaged,
)
from sst2_xlmr.training.optimizer import AdamW, Groups
from sst2_xlmr.training.run_folder import clean_up
from sst2_xlmr.training.state import Progress, Totals, Window
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import Finisher, scratch_name

ALONE = World.alone(torch.device("cpu"))
IDS = torch.arange(50)


def optimizer(seed: int, vocab_size: int = 50) -> AdamW:
    torch.manual_seed(seed)
    model = Classifier(EncoderShape(vocab_size, hidden=8, layers=1, heads=2, ffn=16, positions=20), 2)
    result = AdamW(model, Groups(1, 0.01), 1.0, bf16=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    result.step(0.1, result.gradient_norm())
    return result


def save(folder: Path, step: int, seed: int = 0) -> AdamW:
    saved = optimizer(seed)
    progress = Progress("x", "y", 5, step=step, epoch=1, batch=3)
    window = Window(ALONE)
    window.totals = Totals({"loss": 1.5}, 8.0, 100.0, 2.0, 0.25)
    with Finisher() as finisher:
        save_checkpoint(folder, RunState(progress, window, saved, IDS), Config(), ALONE, finisher)
    return saved


def new_state(optimizer: AdamW, ids: torch.Tensor = IDS, digests: tuple[str, str] = ("x", "y")) -> RunState:
    return RunState(Progress(*digests, 5), Window(ALONE), optimizer, ids)


def master(optimizer: AdamW, name: str) -> torch.Tensor:
    return next(slot.master() for slot in optimizer.slots if slot.name == name)


def test_other_rows_or_weights_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for digests, what in ((("z", "y"), "rows"), (("x", "z"), "weights")):
        with pytest.raises(UserError, match=f"the training {what} differ"):
            load_checkpoint(tmp_path / "step-00000001", new_state(optimizer(0), digests=digests), 0, ALONE)


def test_everything_comes_back(tmp_path: Path) -> None:
    saved = save(tmp_path, 7)
    expected = torch.rand(5)  # the numbers that come after the save
    checkpoint = find_checkpoint(tmp_path, pytest.fail)
    assert checkpoint is not None
    loaded = optimizer(1)
    state = new_state(loaded)
    load_checkpoint(checkpoint, state, 0, ALONE)
    assert state.progress == Progress("x", "y", 5, step=7, epoch=1, batch=3)
    assert state.window.totals == Totals({"loss": 1.5}, 8.0, 100.0, 2.0, 0.25)
    assert (loaded.steps, loaded.table_decay) == (1, saved.table_decay)
    for mine, other in zip(loaded.slots, saved.slots):
        assert torch.equal(mine.master(), other.master())
        assert torch.equal(mine.working, other.working)
    for name, tensor in saved.moments().items():
        assert torch.equal(loaded.moments()[name], tensor)
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
    new_row = master(wider, name)[-1].clone()
    load_checkpoint(checkpoint, new_state(wider, ids), 0, ALONE)
    table = master(wider, name)
    assert torch.equal(table[:30], master(saved, name)[:30])
    assert torch.equal(table[30:45], master(saved, name)[35:])
    torch.testing.assert_close(table[-1], new_row * saved.table_decay)
    assert not wider.moments()[f"exp_avg.{name}"][45:].any()


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
    (tmp_path / "step-00000001").rename(scratch_name(tmp_path / "step-00000001"))
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
    load_checkpoint(tmp_path / "step-00000001", new_state(loaded), 0, ALONE)
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


@pytest.mark.parametrize("calls", range(8))
def test_a_kill_while_the_same_step_is_replaced_leaves_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """After any number of renames and removals; the next start brings back what was set aside."""
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    save(folder, 2)
    left = calls

    def killed_after(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise SystemExit
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patched, contextlib.suppress(SystemExit):
        patched.setattr(Path, "rename", killed_after(Path.rename))
        patched.setattr(shutil, "rmtree", killed_after(shutil.rmtree))
        save(folder, 2, seed=5)
    clean_up(tmp_path)
    assert find_checkpoint(folder, pytest.fail) == folder / "step-00000002"
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-00000001", "step-00000002"]
