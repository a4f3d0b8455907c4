"""Option files, and scripts/seeds.py."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, metrics, train_options, user_error

from sst2_xlmr.cli import parse_args
from sst2_xlmr.errors import UserError
from sst2_xlmr.training.run_folder import claim

sys.path.insert(0, str(ROOT / "scripts"))
seeds = importlib.import_module("seeds")

RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.args"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipe_holds_options_and_its_sources(recipe: Path) -> None:
    config, _ = parse_args([f"@{recipe}"])
    assert config.batch_size in (16, 32)
    text = recipe.read_text(encoding="utf-8")
    assert "Source: " in text or "https://" in text
    command = re.search(r"^# python train.py (.+)$", text, re.MULTILINE)
    assert command, "it says how it is used"
    assert f"@scripts/recipes/{recipe.name}" in command[1].split()


def test_torchrecipes_settings() -> None:
    config, _ = parse_args([f"@{ROOT / 'scripts/recipes/torchrecipes.args'}"])
    assert (config.lr, config.batch_size, config.epochs, config.weight_decay) == (1e-5, 16, 1, 0.0)
    assert (config.schedule, config.warmup_ratio, config.max_grad_norm) == ("constant", 0.0, 0.0)


def test_a_file_of_options_and_what_overrides_it(tmp_path: Path) -> None:
    (tmp_path / "a.args").write_text("# it's a comment\n--lr 3e-5  # why\n\n--label-names 'not so,yes' --epochs=7\n")
    config, _ = parse_args(["--epochs", "2", f"@{tmp_path / 'a.args'}", "--lr", "1e-4"])
    assert (config.lr, config.epochs) == (1e-4, 7), "the last one wins"
    assert config.label_names == ["not so", "yes"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read {file}, named by @{file}: No such file"),
        (b"--lr '3e-5", "{file} does not hold options: No closing quotation"),
        (b"--lr \xff", "{file} does not hold options: "),
        (b"--epoch 3", "unknown argument --epoch; did you mean --epochs?"),
        (b"--epochs many", "--epochs"),
        (b"words", "unknown argument words"),
    ],
)
def test_a_wrong_file_of_options(
    tmp_path: Path, content: bytes | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.args"
    if content is not None:
        file.write_bytes(content)
    assert says.format(file=file) in user_error(lambda: parse_args([f"@{file}"]), capsys)


def test_help_names_files_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert "@FILE takes options from a file" in capsys.readouterr().out


def run_seeds(*options: object) -> None:
    seeds.main([str(option) for option in options])


def test_seeds_are_run_once_and_summed_up(
    tiny_encoder: Path, small_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = train_options(tiny_encoder, small_data, tmp_path / "all", "--epochs", 1)
    (tmp_path / "tiny.args").write_text("\n".join(options[2:]))
    words = ["--seeds", "3,5", *options[:2], f"@{tmp_path / 'tiny.args'}", "--output-dir", tmp_path / "all"]
    run_seeds(*words)
    first = capfd.readouterr().out.splitlines()
    runs = [tmp_path / "all" / f"seed-{seed}" for seed in (3, 5)]
    assert [json.loads((run / "config.json").read_text())["seed"] for run in runs] == [3, 5]
    values = [metrics(run)[-1]["accuracy"] for run in runs]
    names = ["seed", "3", "5", "mean", "deviation"]
    numbers = [f"{n:.4f}" for n in (*values, sum(values) / 2, abs(values[0] - values[1]) / 2**0.5)]
    found = [line.split()[:2] for line in first[-5:]]
    assert found == [list(pair) for pair in zip(names, ["dev", *numbers])]

    (runs[1] / "model").rename(tmp_path / "away")  # as if the second had been stopped before its end
    run_seeds(*words)
    again = capfd.readouterr().out
    assert again.splitlines()[0] == f"seed 3: {runs[0]} is finished"
    assert re.search(r"^resume +from .*seed-5.*step-00000007$", again, re.MULTILINE)
    assert again.splitlines()[-5:] == first[-5:]

    with pytest.raises(UserError, match="--lr 0.5 differs from 0.001"):
        run_seeds(*words, "--lr", "0.5")


def test_a_failing_run_ends_it_with_its_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_seeds("--seeds", "1,2", "--output-dir", tmp_path / "all", "--train-file", "no/such")
    printed = capfd.readouterr()
    assert stop.value.code == 2
    assert printed.err.startswith("error: --train-file no/such is not a file")
    assert "seed 2" not in printed.out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_stopped_ends_it(
    number: signal.Signals, tiny_encoder: Path, small_data: Path, tmp_path: Path
) -> None:
    options = train_options(tiny_encoder, small_data, tmp_path / "all", "--epochs", 100_000)
    command = [sys.executable, str(ROOT / "scripts" / "seeds.py"), "--seeds", "1,2", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("step "):
                # A terminal's Ctrl-C goes to both processes.
                os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
                break
        assert process.wait() == 128 + number
        # Training has ended before: the same command, given at once, does not find its folder in use.
        claim(tmp_path / "all" / "seed-1").close()
        rest = process.stdout.read()
    assert f"by {number.name} after step" in rest
    assert "seed 2" not in rest
    assert not (tmp_path / "all" / "seed-2").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seeds", "1,x"], "'1,x' is not a list of different seeds"),
        (["--seeds", "1,01"], "'1,01' is not a list of different seeds"),
        (["--seeds", "1", "--seed=2"], "leave out --seed=2"),
        (["--seeds", "1", "--resume"], "leave out --resume"),
        ([], "required: --seeds"),
    ],
)
def test_wrong_use_of_seeds(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in user_error(lambda: seeds.main(["--output-dir", "x", *options]), capsys)
    assert not os.path.lexists("x")
