"""SIGTERM, SIGINT, SIGUSR1: the step is finished, the run saved, and the rest of it equals the undisturbed run."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL_ENCODER, needs_small_encoder, train_options
from running import charted, digests, launcher, logged, started, wait_for, workers
from safetensors.torch import load_file

from sst2_xlmr.export.folder import write_folder
from sst2_xlmr.model.encoders import Encoder, EncoderShape
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.training.signals import StopRequest
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import SIGNALS

STEPS = 250  # some seconds; a signal comes in the first of them


def options(encoder: Path, data: Path, run: Path, *more: object) -> list[str]:
    return train_options(encoder, data, run, "--max-steps", STEPS, "--eval-every", 40, *more)


@pytest.fixture(scope="module")
def whole(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The undisturbed run, and the data it was trained on."""
    from conftest import SAMPLE_DATA

    folder = tmp_path_factory.mktemp("signals")
    data = folder / "data"
    data.mkdir()
    for split in ("train", "dev"):
        lines = (SAMPLE_DATA / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        (data / f"{split}.tsv").write_text("\n".join(lines[:60]) + "\n", encoding="utf-8")
    with started([*launcher(1), "train.py", *options(tiny_encoder, data, folder / "whole")], folder / "log") as process:
        assert process.wait() == 0, (folder / "log").read_text()
    return folder / "whole", data


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_signal_saves_and_the_rest_is_exact(
    number: signal.Signals, tiny_encoder: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with started([*launcher(1), "train.py", *options(tiny_encoder, whole[1], run)], log) as process:
        wait_for(log, "step ", process, times=30)
        process.send_signal(number)
        process.send_signal(number)  # a second one is harmless
        assert process.wait(timeout=60) == 128 + number
    said = log.read_text()
    assert f"stopped    by {number.name} after step " in said
    assert f"train.py --resume --output-dir {run}" in said
    assert "Traceback" not in said
    assert not (run / "model").exists()
    with started([*launcher(1), "train.py", "--resume", "--output-dir", str(run)], log) as process:
        assert process.wait() == 0, log.read_text()
    assert digests(run) == digests(whole[0])
    assert logged(run) == logged(whole[0])
    assert charted(run) == list(range(1, STEPS + 1))


def test_sigterm_to_the_whole_group_saves_and_the_rest_is_exact(
    tiny_encoder: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """As systemd, timeout and scancel send it: the loader's workers get it too, and before the step is done."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = options(tiny_encoder, whole[1], run, "--num-workers", 2)
    with started([*launcher(1), "train.py", *words], log) as process:
        wait_for(log, "step ", process, times=30)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM, log.read_text()
    assert "stopped    by SIGTERM after step " in log.read_text()
    assert "Traceback" not in log.read_text()
    with started([*launcher(1), "train.py", "--resume", "--output-dir", str(run)], log) as process:
        assert process.wait() == 0, log.read_text()
    assert digests(run) == digests(whole[0])
    assert logged(run) == logged(whole[0])


def test_a_second_signal_does_not_kill_a_process_that_ends() -> None:
    former = signal.getsignal(signal.SIGUSR1)
    with StopRequest(World.alone(torch.device("cpu"))):
        pass
    assert signal.getsignal(signal.SIGUSR1) == former
    try:
        with StopRequest(World.alone(torch.device("cpu"))) as stop:
            signal.raise_signal(signal.SIGUSR1)
        assert stop.number == signal.SIGUSR1
        signal.raise_signal(signal.SIGUSR1)  # would end the tests
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def test_signal_during_evaluation_does_not_wait_for_its_end(
    tiny_encoder: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """It is left, and made again when the run goes on; also if it was the last one."""
    data, run, log = tmp_path / "data", tmp_path / "run", tmp_path / "log"
    shutil.copytree(whole[1], data)
    lines = (data / "dev.tsv").read_text().splitlines()
    (data / "dev.tsv").write_text("\n".join([lines[0], *lines[1:] * 300]) + "\n")
    words = options(tiny_encoder, data, run, "--max-steps", 8, "--eval-batch-tokens", 100, "--eval-every", 0)
    with started([*launcher(1), "train.py", *words], log) as process:
        wait_for(log, "step      8/8", process)
        process.terminate()
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
    assert "dev: accuracy" not in log.read_text()
    with started([*launcher(1), "train.py", "--resume", "--output-dir", str(run)], log) as process:
        assert process.wait() == 0, log.read_text()
    assert log.read_text().count("step      8/8") == 1
    assert [line["step"] for line in logged(run) if "split" in line] == [8]
    assert (run / "model" / "model.safetensors").is_file()


def test_torchrun_passes_it_on_and_all_ranks_stop_at_one_step(
    tiny_encoder: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["train.py", *options(tiny_encoder, whole[1], run)]
    with started([*launcher(2), *words], log) as process:
        wait_for(log, "step ", process, times=30)
        process.terminate()
        assert process.wait(timeout=20) != 0
    assert "stopped    by SIGTERM after step " in log.read_text()
    # Only one rank gets it this time; torchrun then ends too, since its processes did.
    with started([*launcher(2), *words, "--resume"], log) as process:
        wait_for(log, "resume     from", process)
        wait_for(log, "step ", process, times=60)
        os.kill(workers(process)[1], signal.SIGUSR1)
        assert process.wait(timeout=20) != 0
    assert "stopped    by SIGUSR1 after step " in log.read_text()
    with started([*launcher(2), *words, "--resume"], log) as process:
        assert process.wait() == 0, log.read_text()
    assert [line["step"] for line in logged(run) if "split" not in line] == list(range(1, STEPS + 1))
    assert "lost contact" not in log.read_text()


@needs_small_encoder
@pytest.mark.slow
def test_base_shapes_are_saved_and_gone_within_ten_seconds(whole: tuple[Path, Path], tmp_path: Path) -> None:
    """XLM-R base's shapes with random weights: in a step, and in the evaluation after it."""
    shape = EncoderShape()
    model = SequenceClassifier(shape, 2)
    encoder = tmp_path / "encoder"
    tensors = dict(model.named_parameters())
    for tensor in tensors.values():
        torch.nn.init.normal_(tensor.data, 0, 0.02)
    tokenizer_file = SMALL_ENCODER / "sentencepiece.bpe.model"
    write_folder(encoder, tensors, Encoder("", shape, Path(), tokenizer_file, ["a", "b"]))
    assert len(load_file(encoder / "model.safetensors")) > 200
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["--encoder", str(encoder), "--data-dir", str(whole[1]), "--output-dir", str(run), "--device", "cpu"]
    words += ["--batch-size", "16", "--log-every", "1", "--epochs", "20"]
    for moment in ("step      2/", "checkpoint: "):
        log.unlink(missing_ok=True)
        resume = ["--resume"] if run.exists() else []
        with started([*launcher(1), "train.py", *words, *resume], log) as process:
            wait_for(log, moment, process)
            time.sleep(0.3)
            began = time.monotonic()
            process.terminate()
            assert process.wait(timeout=60) == 128 + signal.SIGTERM, log.read_text()
            took_s = time.monotonic() - began
        print(f"SIGTERM at {moment!r}: gone after {took_s:.1f} s")
        assert took_s < 10
        assert "stopped    by SIGTERM" in log.read_text()
