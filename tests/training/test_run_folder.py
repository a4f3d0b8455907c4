"""A run's folder after a start that died; checkpoints: what is written, found, refused and removed."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pkgutil
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALONE, Patch, RunTrain, assert_equal, metrics, refusal, train_options, user_error
from running import resume

from sst2_xlmr import __version__, train
from sst2_xlmr.config import Config
from sst2_xlmr.model.encoders import EncoderShape
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.model.vocabulary import EMBEDDING, Vocabulary
from sst2_xlmr.training.checkpoint import find_checkpoint, find_damage, load_checkpoint, read_state, save_checkpoint
from sst2_xlmr.training.meter import TrainMeter
from sst2_xlmr.training.optimizer import AdamW
from sst2_xlmr.training.run_folder import lock_run_folder, write_config
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util.files import BackgroundWriter, is_scratch, scratch_name

PLACES = {  # where a start is killed: before this is called -> what the run's folder then holds
    "sst2_xlmr.training.run_folder.write_text": {".lock"},
    "sst2_xlmr.train.run_context": {".lock", "config.json"},
    "sst2_xlmr.report.tensorboard.SummaryWriter": {".lock", "config.json", "metrics.jsonl"},
    "sst2_xlmr.training.checkpoint.write_tensors": {".lock", "config.json", "metrics.jsonl", "checkpoints"},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_start_can_be_made_again(tiny_encoder: Path, small_data: Path, tmp_path: Path, place: str) -> None:
    run = tmp_path / "run"
    command = train_options(tiny_encoder, small_data, run, "--epochs", 1, "--save-every", 3)
    command += ["--tensorboard-dir", str(tmp_path / "events")] if "tensorboard" in place else []

    def start_and_be_killed() -> None:
        module, _, function = place.rpartition(".")
        setattr(pkgutil.resolve_name(module), function, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        train.main(command)

    process = multiprocessing.get_context("fork").Process(target=start_and_be_killed, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    scratch_name(run / "config.json").write_text('{"enco')
    assert {file.name for file in run.iterdir() if not is_scratch(file)} - {"tensorboard"} == PLACES[place]
    # As scripts/train.sbatch decides it.
    train.main([*(["--resume"] if (run / "config.json").exists() else []), *command])
    assert [entry["step"] for entry in metrics(run) if "split" not in entry] == list(range(1, 8))
    assert not any(map(is_scratch, run.iterdir()))


def test_a_run_of_another_version_is_refused_but_its_options_are_taken(run_train: RunTrain, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--max-steps", 2)
    config = run / "config.json"
    saved = json.loads(config.read_text())
    assert saved.pop("sst2_xlmr") == __version__
    for version in (None, "0.1.9", "1.2.0"):
        config.write_text(json.dumps({**({"sst2_xlmr": version} if version else {}), **saved}))
        line = user_error(resume, run)
        assert f"version {version or 'before 0.2'} wrote the run in {run}, and this is {__version__}: resume it" in line
        assert f"start over with --config {config} --output-dir NEW_DIR" in line
    train.main(["--config", str(config), "--output-dir", str(tmp_path / "new")])
    config.write_text(json.dumps({"sst2_xlmr": __version__.rpartition(".")[0] + ".99", **saved}))
    resume(run)
    assert json.loads(config.read_text())["sst2_xlmr"] == __version__


def test_a_new_run_overwrites_no_config(tmp_path: Path) -> None:
    """Two starts that both found the folder free: the second comes when the first has ended."""
    with lock_run_folder(tmp_path):
        write_config(tmp_path, Config(), is_new=True)
        line = refusal(write_config, tmp_path, Config(), is_new=True)
        assert "already exists; continue it with --resume or choose" in line
        write_config(tmp_path, Config(), is_new=False)


STATE = TrainState(
    *(5, "bf16", 3, {"tokenizer": "x"}, 7, 1, 2, 0.5, 0.7, 6, 4, 2, True, 3, 1, True, True, 5, 1.5, 0.25, 0.125, [0.5])
)
TOTALS = {"loss": 1.5, "rows": 8.0, "tokens": 100.0, "seconds": 2.0, "grad_norm": 0.25}


def optimizer(seed: int, rows: int = 50) -> AdamW:
    torch.manual_seed(seed)
    model = SequenceClassifier(EncoderShape(rows, hidden=8, layers=1, heads=2, ffn=16, positions=20), 2)
    result = AdamW(model, 1, Config(), ALONE)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    result.step(0.1)
    return result


def save(folder: Path, step: int, seed: int = 0) -> AdamW:
    saved, meter, vocabulary = optimizer(seed), TrainMeter(ALONE), Vocabulary(torch.arange(50), 50)
    meter.totals, vocabulary.unused_rows_factor = TOTALS, 0.75
    with BackgroundWriter() as background_writer:
        state = dataclasses.replace(STATE, step=step)
        save_checkpoint(folder, (state, meter, saved, vocabulary), Config(), ALONE, background_writer)
    return saved


def test_everything_comes_back(tmp_path: Path) -> None:
    assert all(getattr(STATE, field.name) != getattr(TrainState(0), field.name) for field in dataclasses.fields(STATE))
    saved = save(tmp_path, 7)
    expected = torch.rand(5)  # the numbers that come after the save
    checkpoint = find_checkpoint(tmp_path, pytest.fail)
    assert checkpoint is not None
    assert read_state(checkpoint) == STATE
    loaded, meter, vocabulary = optimizer(1), TrainMeter(ALONE), Vocabulary(torch.arange(50), 50)
    load_checkpoint(checkpoint, (STATE, meter, loaded, vocabulary), 0, ALONE)
    assert (meter.totals, vocabulary.unused_rows_factor) == (TOTALS, 0.75)
    assert torch.equal(torch.rand(5), expected)
    assert_equal([loaded.weights(), loaded.moments()], [saved.weights(), saved.moments()])
    steps = {float(values["step"]) for values in loaded._optimizer.state.values()}
    assert steps == {4.0}, "7 batches, of which 3 were skipped"
    tensors = [f"{name}.safetensors" for name in ("model", "optimizer", "random", "vocabulary")]
    names = sorted(file.name for file in checkpoint.iterdir())
    assert names == sorted(["config.json", "manifest.json", "state.json", *tensors])


def test_other_vocabulary_keeps_what_was_trained(tmp_path: Path) -> None:
    old = save(tmp_path, 1)
    wider, vocabulary = optimizer(1, rows=60), Vocabulary(torch.cat([torch.arange(30), torch.arange(35, 65)]), 100)
    new_row = wider.weights()[EMBEDDING][-1:].clone()
    contents = (STATE, TrainMeter(ALONE), wider, vocabulary)
    load_checkpoint(tmp_path / "step-00000001", contents, 0, ALONE)
    pairs = [(wider.weights()[EMBEDDING], old.weights()[EMBEDDING])]
    names = (f"exp_avg.{EMBEDDING}", f"exp_avg_sq.{EMBEDDING}")
    pairs += [(wider.moments()[name], old.moments()[name]) for name in names]
    for found, before in pairs:
        assert torch.equal(found[:30], before[:30])
        assert torch.equal(found[30:45], before[35:50])
    torch.testing.assert_close(pairs[0][0][-1:], new_row * 0.75)
    assert not any(found[45:].any() for found, _ in pairs[1:])


def test_another_number_of_processes_begins_new_random_streams(tmp_path: Path) -> None:
    save(tmp_path, 1)
    drawn = []
    for rank, step in ((0, 5), (1, 5), (0, 6)):
        world = dataclasses.replace(ALONE, rank=rank, local_rank=rank, world_size=2, local_world_size=2)
        state = dataclasses.replace(STATE, step=step)
        contents = (state, TrainMeter(ALONE), optimizer(1), Vocabulary(torch.arange(50), 50))
        load_checkpoint(tmp_path / "step-00000001", contents, 0, world)
        drawn.append(str(torch.rand(3)))
    assert len(set(drawn)) == 3


def test_oldest_are_removed_and_an_unfinished_one_does_not_exist(tmp_path: Path) -> None:
    save(tmp_path, 6)
    (tmp_path / "step-00000006").rename(scratch_name(tmp_path / "step-00000006"))
    assert find_checkpoint(tmp_path, pytest.fail) is None
    for step in range(1, 6):
        save(tmp_path, step)
    left = sorted(tmp_path.glob("step-*"))
    assert [entry.name for entry in left] == ["step-00000004", "step-00000005"]
    assert not any(map(find_damage, left))
    assert "cannot write the checkpoint" in refusal(save, left[0] / "state.json", 1), "a file is in the way"


@pytest.mark.parametrize("calls", range(8))
def test_a_kill_while_the_same_step_is_replaced_leaves_one(tmp_path: Path, monkeypatch: Patch, calls: int) -> None:
    """After any number of renames and removals; the next start brings back what was set aside."""
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    tables = [save(folder, 2, seed).weights()[EMBEDDING] for seed in (0, 5)]
    save(folder, 2)
    left = iter(range(calls))

    def killed_after(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise SystemExit
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patched, contextlib.suppress(SystemExit):
        patched.setattr(Path, "rename", killed_after(Path.rename))
        patched.setattr(shutil, "rmtree", killed_after(shutil.rmtree))
        save(folder, 2, seed=5)
    lock_run_folder(tmp_path).close()
    assert find_checkpoint(folder, pytest.fail) == folder / "step-00000002"
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-00000001", "step-00000002"]
    loaded = optimizer(9)
    contents = (STATE, TrainMeter(ALONE), loaded, Vocabulary(torch.arange(50), 50))
    load_checkpoint(folder / "step-00000002", contents, 0, ALONE)
    is_from = [torch.equal(loaded.weights()[EMBEDDING], table) for table in tables]  # type: ignore[arg-type]
    assert is_from == [False, True] or (is_from == [True, False] and calls < 4)
