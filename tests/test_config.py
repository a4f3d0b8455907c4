"""The command line and its files: what is read, and one line with status 2 for all that is wrong."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Capture, Patch, RunTrain, user_error
from running import resume

from sst2_xlmr import train
from sst2_xlmr.cli import command_line_of, parse_args
from sst2_xlmr.config import OPTIONS, Config, flag
from sst2_xlmr.util.flag_hints import hint


def test_flags_override_a_config_file_and_that_the_defaults(tmp_path: Path) -> None:
    assert parse_args([]) == (Config(), False)
    saved = dataclasses.replace(Config(), lr=3e-5, freeze_encoder=True, label_names=["a", "b"])
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(saved)))
    config, _ = parse_args(["--config", str(tmp_path / "config.json"), "--no-freeze-encoder", "--epochs", "7"])
    assert config == dataclasses.replace(saved, freeze_encoder=False, epochs=7)


def test_a_command_line_gives_back_its_config() -> None:
    """With every digit of a number."""
    config = Config(
        lr=1.2345678e-5, weight_decay=1 / 3, epochs=2.0, seed=7, label_names=["a", "b"], freeze_encoder=True
    )
    assert parse_args(command_line_of(config))[0] == config


def test_paths_are_kept_absolute(tmp_path: Path, monkeypatch: Patch) -> None:
    """A saved config.json, and --resume, work from any folder."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "de.tsv").touch()
    config, _ = parse_args(["--data-dir", "data", "--encoder", "xlmr.base", "--eval-file", "de=de.tsv"])
    assert (config.data_dir, config.eval_file) == (str(tmp_path / "data"), [f"de={tmp_path / 'de.tsv'}"])
    assert config.encoder == "xlmr.base"


def test_help_names_every_option_with_its_default(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        parse_args(["--help"])
    text = capsys.readouterr().out
    groups = ["data:", "model:", "training:", "machine:", "output:", "@FILE takes options from a file"]
    for says in (*groups, "[2e-05]", "[on]", *(f"{flag(name)} " for name in OPTIONS)):
        assert says in text
    assert "==SUPPRESS==" not in text


WRONG_FLAGS = [
    ([""], "unknown argument ''; see --help"),
    (["--lrr", "1"], "unknown argument --lrr; did you mean --lr?"),
    (["--patience=3"], "unknown argument --patience; did you mean --early-stopping-patience?"),
    (["--epochs"], "expected one argument"),
    (["--epochs", "three"], "--epochs: invalid float value: 'three'"),
    (["--max-steps", "-1"], "--max-steps must be 0 or more"),
    (["--lr", "0"], "--lr must be above 0"),
    (["--lr", "nan"], "--lr must be above 0"),
    (["--schedule", "step"], "--schedule must be one of linear, cosine, constant"),
    (["--layerwise-lr-decay", "1.5"], "--layerwise-lr-decay must be"),
    (["--warmup-ratio", "2"], "--warmup-ratio must be from 0 to 1"),
    (["--dropout", "1"], "--dropout must be from 0 to 1 (excluded)"),
    (["--precision", "tf32"], "--precision tf32 is for CUDA; use fp32 on a CPU"),
    (["--device", "cuda"], "torch finds no CUDA GPU"),
    (["--max-length", "513"], "takes at most 64 tokens"),
    (["--layers", "4"], "has 3 layers"),
    (["--label-names", "good"], "--label-names must be two or more"),
    (["--data-dir", "no/such/folder"], "--data-dir no/such/folder is not a directory"),
    (["--train-file", "no.tsv"], "--train-file no.tsv does not exist"),
    (["--eval-file", "a/b=x.tsv"], "--eval-file must be NAME=FILE"),
    (["--eval-file", "mean=train.py"], "must have another name than mean"),
    (["--eval-file", "train=train.py"], "must have another name than train"),
    (["--eval-file", "a=train.py", "--eval-file", "a=README.md"], "two files have the name a, train.py and README.md"),
    (["--label-names", ",".join(map(str, range(1001)))], "different names (at most 1,000)"),
    (["--text-pair-column", "label", "--max-length", "5"], "--max-length must be 6 or more with --text-pair-column"),
    (["--columns", "dev"], "--columns must be SPLIT:KEY=VALUE"),
    (["--columns", "dev:encoding=latin-x"], "--columns encoding=latin-x must be a text encoding"),
    (["--columns", "dev:weight=w"], "only training rows are weighted"),
    (["--columns", "devv:text=x"], "--columns devv: there is no such file; there are train, dev"),
    (["--encoding", "latin-x"], "--encoding must be a text encoding, such as utf-8"),
    (["--delimiter", "'"], "--delimiter must not have quotation marks"),
    (["--delimiter", "::", "--quoting", "double"], "--delimiter :: has several characters, which needs --quoting none"),
    (["--class-weights", "1"], "--class-weights must be balanced, or a number of 0 or more for every class"),
    (["--class-weights", "1,2,3"], "--class-weights has 3 numbers, but there are 2 classes"),
    (["--class-weights", "balanced", "--label-names", "negative,positive,so-so"], "no row of class 'so-so'"),
    (["--encoder", "bert-base"], "bert-base: neither a folder, nor xlmr.base, xlmr.large, nor"),
    (["--encoder", "."], "has no config.json"),
    (["--config", "no.json"], "cannot read no.json"),
    (["--resume", "--config", "x.json"], "leave out --config"),
    (["--resume"], "nothing to resume"),
    (["--output-dir", "pyproject.toml"], "already exists"),
    (["--train-file", "caf\udce9.tsv"], r"--train-file 'caf\udce9.tsv' is not UTF-8"),
    (["--output-dir", "pyproject.toml/run"], "cannot write to --output-dir"),
    (["--tensorboard-dir", "pyproject.toml/x"], "cannot write to --tensorboard-dir"),
    (["--data-dir", ""], "--data-dir is empty"),
]


@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="a GPU may be there")
@pytest.mark.parametrize(("options", "says"), WRONG_FLAGS, ids=[" ".join(options) for options, _ in WRONG_FLAGS])
def test_wrong_flags(run_train: RunTrain, tmp_path: Path, options: list[str], says: str, monkeypatch: Patch) -> None:
    monkeypatch.chdir(ROOT)
    assert says in user_error(run_train, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists(), "a corrected command would find the folder taken"


def write(file: str, content: bytes) -> Callable[[Path], Any]:
    return lambda data: (data / file).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: shutil.copy(data / "train.tsv", data / "train.csv"), "keep one, or use --train-file"),
        (write("dev.tsv", b"sentence\tlabel\nx\t5\n"), "dev.tsv, line 2: label '5' is neither"),
        (write("test.tsv.gz", b"sentence\tlabel\nx\t1\n"), "test.tsv.gz is not a complete gzip file"),
        (write("train.tsv", b"PK\x03\x04\xff\xfe" + bytes(range(256))), "train.tsv is not a complete zip file"),
    ],
)
def test_wrong_files(run_train: RunTrain, small_data: Path, tmp_path: Path, damage: Any, says: str) -> None:
    """Before anything slow, as the download of an encoder is."""
    damage(small_data)
    assert says in user_error(run_train, tmp_path / "run", "--encoder", "xlmr.base")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "as JSON: "),
        ("[]", "does not hold a JSON object"),
        ('{"learning_rate": 1}', "unknown option 'learning_rate'; did you mean lr?"),
        ('{"epochs": "3"}', "'epochs' has the value '3'"),
        ('{"lr": null}', "'lr' has the value None"),
        ('{"epochs": 0}', "--epochs must be"),
        ('{"label_names": "a,b"}', "'label_names' has the value 'a,b'"),
        ('{"header": "yes"}', "'header' has the value 'yes'"),
    ],
)
def test_wrong_config_files(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert says in user_error(train.main, ["--config", str(tmp_path / "config.json")])


def test_resume_refuses_what_would_compute_something_else(run_train: RunTrain, tmp_path: Path, capsys: Capture) -> None:
    run = run_train(tmp_path / "run", "--epochs", 1)
    capsys.readouterr()
    autos = [[flag(name), "auto"] for name in ("text_column", "text_pair_column", "label_column", "precision")]
    for options in (["--lr", "1e-4"], ["--seed", "5"], ["--batch-size", "16"], ["--epochs", "2"], *autos):
        line = user_error(resume, run, *options)
        assert f"{options[0]} {options[1].replace('1e-4', '0.0001')} differs from" in line
    assert "auto differs from fp32, with which the run in" in line
    resume(run, "--log-every", 2, "--precision", "fp32")
    auto = run.rename(tmp_path / "auto")
    config, _ = parse_args(["--resume", "--output-dir", str(auto), "--device", "auto"])
    assert (config.output_dir, config.device) == (str(auto), "auto"), "a folder of this name stays what it is"


FLAGS = [*map(flag, OPTIONS), "--no-header", "--no-compile", "--config", "--resume", "--help"]
POINTERS = {
    "--lr": "learning_rate lrr",
    "--batch-size": "per_device_train_batch_size batchsize",
    "--eval-batch-tokens": "per-device-eval-batch-size",
    "--precision": "fp16 bf16",
    "--max-length": "max_seq_length max_len",
    "--train-file": "train_file train_data_file",
    "--best-by": "metric_for_best_model",
    "--label-column": "lable-column label_column_name",
}
NEEDLESS = ("do_train", "do_eval", "overwrite_output_dir", "load_best_model_at_end", "greater_is_better")
UNLIKE_OURS = """
    optim adam_beta1 gradient_checkpointing group_by_length length_column_name report_to push_to_hub task_name cache_dir
    tokenizer_name max_train_samples data_seed eval_delay save_only_model log_level dataloader_drop_last num_labels
    steps size file names decay data output logging_first_step eval_accumulation_steps lr_scheduler_kwargs
"""


def test_flags_of_others_point_to_ours_if_there_is_an_equal() -> None:
    for ours, others in POINTERS.items():
        for given in others.split():
            assert re.match(rf"did you mean {ours}[ ?]", hint(f"--{given}", FLAGS)), given
    assert not any(hint(f"--{name}", FLAGS) for name in UNLIKE_OURS.split())
    assert all(hint(f"--{name}", FLAGS).startswith("leave it out: ") for name in NEEDLESS)
    assert hint("--learning_rate", ["--model", "--input"]) == "", "a program without it"
    assert hint("--model_name_or_path", ["--model", "--input"]) == "did you mean --model?"


RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.args"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipe_holds_options_and_its_sources(recipe: Path) -> None:
    config, _ = parse_args([f"@{recipe}"])
    assert config.batch_size in (16, 32)
    assert 1e-5 <= config.lr <= 1e-4, "beyond the rates that encoders of this kind are fine-tuned with"
    text = recipe.read_text(encoding="utf-8")
    assert "Source: " in text or "https://" in text
    command = re.search(r"^# python train.py (.+)$", text, re.MULTILINE)
    assert command, "it says how it is used"
    assert f"@scripts/recipes/{recipe.name}" in command[1].split()
    if recipe.stem == "torchrecipes":
        assert (config.lr, config.batch_size, config.epochs, config.weight_decay) == (1e-5, 16, 1, 0.0)
        assert (config.schedule, config.warmup_ratio, config.max_grad_norm) == ("constant", 0.0, 0.0)


def test_a_file_of_options_and_what_overrides_it(tmp_path: Path) -> None:
    file = tmp_path / "a.args"
    file.write_text("# it's a comment\n--lr 3e-5  # why\n\n--label-names 'not so,yes' --epochs=7\n")
    config, _ = parse_args(["--epochs", "2", f"@{file}", "--lr", "1e-4"])
    assert (config.lr, config.epochs) == (1e-4, 7), "the last one wins"
    assert config.label_names == ["not so", "yes"]
    for content, says in ((b"--lr '3e-5", "No closing quotation"), (b"--lr \xff", "")):
        file.write_bytes(content)
        assert f"{file} does not hold options: {says}" in user_error(parse_args, [f"@{file}"])
    file.unlink()
    assert f"cannot read {file}, named by @{file}: No such file" in user_error(parse_args, [f"@{file}"])
