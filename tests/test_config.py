"""The command line and its files: what is read, and one line with status 2 for all that is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, train_options, user_error
from safetensors.torch import load_file, save_file

from sst2_xlmr import train
from sst2_xlmr.cli import parse_args
from sst2_xlmr.config import OPTIONS, Config, flag, plain_name
from sst2_xlmr.util.flag_hints import hint


def test_defaults_are_those_of_config() -> None:
    assert parse_args([]) == (Config(), False)


def test_flags_override_a_config_file(tmp_path: Path) -> None:
    saved = dataclasses.replace(Config(), lr=3e-5, freeze_encoder=True, label_names=["a", "b"])
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(saved)))
    config, _ = parse_args(["--config", str(tmp_path / "config.json"), "--no-freeze-encoder", "--epochs", "7"])
    assert config == dataclasses.replace(saved, freeze_encoder=False, epochs=7)


def test_paths_are_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved config.json, and --resume, work from any folder."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    config, _ = parse_args(["--data-dir", "data", "--encoder", "xlmr.base"])
    assert config.data_dir == str(tmp_path / "data")
    assert config.encoder == "xlmr.base"


def test_help_names_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"{flag(name)} " in text for name in OPTIONS)
    assert "[2e-05]" in text
    assert "[on]" in text
    assert "==SUPPRESS==" not in text
    for group in ("data:", "model:", "training:", "machine:", "output:", "@FILE takes options from a file"):
        assert group in text


WRONG_FLAGS = [
    ([""], "unknown argument ''; see --help"),
    (["--lrr", "1"], "unknown argument --lrr; did you mean --lr?"),
    (["--patience=3"], "unknown argument --patience; did you mean --early-stopping-patience?"),
    (["--learning-rate", "1"], "unknown argument --learning-rate; did you mean --lr?"),
    (["--optim", "adafactor"], "unknown argument --optim; see --help"),
    (["--epochs"], "expected one argument"),
    (["--epochs", "three"], "--epochs: invalid float value: 'three'"),
    (["--epochs", "0"], "--epochs must be"),
    (["--max-steps", "-1"], "--max-steps must be 0 or more"),
    (["--batch-size", "0"], "--batch-size must be 1 or more"),
    (["--batch-size", "2.5"], "invalid int value"),
    (["--micro-batch-size", "-3"], "--micro-batch-size must be"),
    (["--lr", "0"], "--lr must be above 0"),
    (["--lr", "nan"], "--lr must be above 0"),
    (["--lr", "inf"], "--lr must be above 0"),
    (["--weight-decay", "-0.1"], "--weight-decay must be"),
    (["--layerwise-lr-decay", "1.5"], "--layerwise-lr-decay must be"),
    (["--schedule", "step"], "--schedule is not one of linear, cosine, constant"),
    (["--warmup-ratio", "2"], "--warmup-ratio must be from 0 to 1"),
    (["--label-smoothing", "1"], "--label-smoothing must be"),
    (["--dropout", "1"], "--dropout must be from 0 to 1 (excluded)"),
    (["--precision", "fp16"], "--precision is not one of"),
    (["--precision", "tf32"], "--precision tf32 is for CUDA; take fp32 on a CPU"),
    (["--device", "tpu"], "--device is not one of"),
    (["--device", "cuda"], "torch finds no CUDA GPU"),
    (["--seed", "-1"], "--seed must be"),
    (["--keep-checkpoints", "1"], "--keep-checkpoints must be 2 or more"),
    (["--log-every", "0"], "--log-every must be"),
    (["--max-length", "2"], "--max-length must be"),
    (["--max-length", "513"], "takes at most 64 tokens"),
    (["--layers", "4"], "has 3 layers"),
    (["--label-names", "good"], "--label-names needs two or more"),
    (["--label-names", "a,a"], "--label-names needs two or more different names"),
    (["--timeout-minutes", "0"], "--timeout-minutes must be above 0"),
    (["--data-dir", "no/such/folder"], "--data-dir no/such/folder is not a directory"),
    (["--train-file", "no.tsv"], "--train-file no.tsv is not a file"),
    (["--dev-file", "no.tsv"], "--dev-file no.tsv is not a file"),
    (["--test-file", "no.tsv"], "--test-file no.tsv is not a file"),
    (["--eval-file", "=x.tsv"], "--eval-file takes NAME=FILE"),
    (["--eval-file", "a/b=x.tsv"], "--eval-file takes NAME=FILE"),
    (["--eval-file", "train=train.py"], "takes other names than train"),
    (["--eval-file", "a=train.py", "--eval-file", "a=README.md"], "two files have the name a, train.py and README.md"),
    (["--eval-file", "de=no.tsv"], "--eval-file no.tsv is not a file"),
    (["--label-names", ",".join(map(str, range(1001)))], "different names (at most 1,000)"),
    (["--text-pair-column", "hypothesis"], "no column 'hypothesis' among sentence, label; name it with --text-pair"),
    (["--text-pair-column", "label", "--max-length", "5"], "--max-length must be 6 or more with --text-pair-column"),
    (["--no-header"], "train.tsv has integers and words as labels"),
    (["--best-by", "f1"], "--best-by is one of accuracy, macro_f1, loss, mean, not f1"),
    (["--columns", "dev"], "--columns takes SPLIT:KEY=VALUE"),
    (["--encoding", "latin-x"], "--encoding latin-x is unknown"),
    (["--quoting", "csv"], "--quoting is not one of none, double, single, backslash"),
    (["--class-weights", "1"], "--class-weights is neither balanced nor a number of 0 or more for every class"),
    (["--class-weights", "1,-1"], "--class-weights is neither"),
    (["--class-weights", "0,0"], "--class-weights is neither"),
    (["--class-weights", "1,nan"], "--class-weights is neither"),
    (["--class-weights", "equal"], "--class-weights is neither"),
    (["--class-weights", "1,2,3"], "--class-weights has 3 numbers, but there are 2 classes"),
    (["--class-weights", "balanced", "--label-names", "negative,positive,so-so"], "no row of class 'so-so'"),
    (["--text-column", "review"], "no column 'review' among sentence, label; name it with --text-column"),
    (["--label-column", "stars"], "no column 'stars'"),
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
    (["stray"], "unknown argument stray"),
]


@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="a GPU may be there")
@pytest.mark.parametrize(("options", "says"), WRONG_FLAGS, ids=[" ".join(options) for options, _ in WRONG_FLAGS])
def test_wrong_flags(
    options: list[str],
    says: str,
    tiny_encoder: Path,
    small_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    line = user_error(lambda: train.main(train_options(tiny_encoder, small_data, tmp_path / "run", *options)), capsys)
    assert says in line
    assert not (tmp_path / "run").exists(), "a corrected command would find the folder taken"


def write(file: str, content: bytes) -> Callable[[Path], Any]:
    return lambda data: (data / file).write_bytes(content)


def folder_for_file(data: Path) -> None:
    (data / "train.tsv").unlink()
    (data / "train.tsv").mkdir()


WRONG_FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no train", lambda data: (data / "train.tsv").unlink(), "has no train.tsv"),
    ("two trains", lambda data: shutil.copy(data / "train.tsv", data / "train.csv"), "keep one, or use --train-file"),
    ("empty", write("train.tsv", b""), "train.tsv has no rows"),
    ("header only", write("dev.tsv", b"sentence\tlabel\n"), "dev.tsv has no rows"),
    ("bad label", write("dev.tsv", b"sentence\tlabel\nx\t5\n"), "dev.tsv, line 2: label '5' is neither"),
    ("one label", write("train.tsv", b"sentence\tlabel\nx\t5\n"), "train.tsv: all rows have the label '5'"),
    ("fractions", write("train.tsv", b"sentence\tlabel\nx\t1.5\n"), "train.tsv, line 2: label '1.5' is a fraction"),
    (
        "no label",
        write("dev.tsv", b"sentence\tlabel\nx\t1\ny\t\n"),
        "dev.tsv, line 3: 1 of 2 rows cannot be used: 1 without a label",
    ),
    ("true", write("test.jsonl", b'{"text": "x", "label": true}\n'), "test.jsonl, line 1: label 'true' is neither"),
    ("no gzip", write("test.tsv.gz", b"sentence\tlabel\nx\t1\n"), "test.tsv.gz is not a whole gzip file"),
    ("latin-1", write("train.tsv", b"sentence\tlabel\ncaf\xe9\t1\n"), "1 with cut characters (line 2)"),
    (
        "truncated row",
        write("train.tsv", b"sentence\tlabel\nx\t1\nhalf a se"),
        "1 with another number of columns (line 3: 1, not 2)",
    ),
    ("zip", write("train.tsv", b"PK\x03\x04\xff\xfe" + bytes(range(256))), "train.tsv is not a whole zip file"),
    ("folder", folder_for_file, "has no train.tsv"),
]


@pytest.mark.parametrize(("damage", "says"), [case[1:] for case in WRONG_FILES], ids=[case[0] for case in WRONG_FILES])
def test_wrong_files(
    damage: Callable[[Path], Any],
    says: str,
    tiny_encoder: Path,
    small_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(small_data)
    line = user_error(lambda: train.main(train_options(tiny_encoder, small_data, tmp_path / "run")), capsys)
    assert says in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "as JSON: "),
        ("[]", "does not hold a JSON object"),
        ('{"learning_rate": 1}', "unknown option 'learning_rate'; did you mean lr?"),
        ('{"batchsize": 1}', "did you mean batch_size?"),
        ('{"epochs": "3"}', "'epochs' has the value '3'"),
        ('{"epochs": true}', "'epochs' has the value True"),
        ('{"lr": null}', "'lr' has the value None"),
        ('{"epochs": 0}', "--epochs must be"),
        ('{"label_names": "a,b"}', "'label_names' has the value 'a,b'"),
        ('{"label_names": ["a"]}', "--label-names needs two or more"),
        ('{"class_weights": [1, 2]}', "'class_weights' has the value [1, 2]"),
        ('{"header": "yes"}', "'header' has the value 'yes'"),
    ],
)
def test_wrong_config_files(content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(content)
    assert says in user_error(lambda: train.main(["--config", str(tmp_path / "config.json")]), capsys)


def test_resume_refuses_what_would_compute_something_else(
    run_train: Callable[..., Path],
    tiny_encoder: Path,
    small_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_train(tmp_path / "run", "--epochs", 1)
    resume = ["--resume", "--output-dir", str(run)]
    capsys.readouterr()
    autos = [[flag(name), "auto"] for name in ("text_column", "text_pair_column", "label_column", "precision")]
    for options in (["--lr", "1e-4"], ["--seed", "5"], ["--batch-size", "16"], ["--epochs", "2"], *autos):
        line = user_error(partial(train.main, [*resume, *options]), capsys)
        assert f"{options[0]} {options[1].replace('1e-4', '0.0001')} differs from" in line
    assert "auto differs from fp32, with which the run in" in line
    train.main([*resume, "--log-every", "2", "--precision", "fp32"])
    other = shutil.copytree(tiny_encoder, tmp_path / "other")
    tensors = load_file(tiny_encoder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors")
    line = user_error(lambda: train.main([*resume, "--encoder", str(other)]), capsys)
    assert "the encoder's weights differ" in line
    with (small_data / "train.tsv").open("a") as file:
        file.write("one more\t1\n")
    capsys.readouterr()
    assert "the training rows differ" in user_error(lambda: train.main(resume), capsys)


def test_a_run_in_a_folder_named_auto_stays_there(run_train: Callable[..., Path], tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "--epochs", 1)
    auto = shutil.copytree(run, tmp_path / "auto")
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    train.main(["--resume", "--output-dir", str(auto)])
    config, _ = parse_args(["--resume", "--output-dir", str(auto), "--device", "auto"])
    assert (config.output_dir, config.device) == (str(auto), "auto")
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


FLAGS = [*map(flag, OPTIONS), "--no-header", "--no-compile", "--config", "--resume", "--help"]
POINTERS = {
    "--lr": "learning_rate lrr",
    "--batch-size": "per_device_train_batch_size batchsize",
    "--eval-batch-tokens": "per-device-eval-batch-size",
    "--micro-batch-size": "gradient_accumulation_steps",
    "--epochs": "num_train_epochs epoch",
    "--encoder": "model_name_or_path",
    "--warmup-ratio": "warmup_steps warmup-steps",
    "--schedule": "lr_scheduler_type lr_scheduler",
    "--label-smoothing": "label_smoothing_factor",
    "--precision": "fp16 bf16",
    "--device": "no_cuda",
    "--eval-every": "evaluation_strategy eval_steps",
    "--early-stopping-patience": "patience",
    "--save-every": "save_steps",
    "--keep-checkpoints": "save_total_limit",
    "--log-every": "logging_steps",
    "--tensorboard-dir": "logging_dir",
    "--max-length": "max_seq_length max_len",
    "--train-file": "train_file train_data_file",
    "--dev-file": "validation_file",
    "--text-column": "text_column_name",
    "--label-column": "lable-column label_column_name",
    "--num-workers": "dataloader_num_workers",
    "--output-dir": "output_dir",
    "--resume": "resume_from_checkpoint",
}
NEEDLESS = ("do_train", "do_eval", "overwrite_output_dir", "load_best_model_at_end", "metric_for_best_model")
UNLIKE_OURS = """
    optim adam_beta1 adam_epsilon gradient_checkpointing group_by_length length_column_name report_to push_to_hub
    task_name dataset_name cache_dir tokenizer_name max_train_samples pad_to_max_length data_seed eval_delay deepspeed
    fsdp ddp_backend auto_find_batch_size save_only_model save_safetensors log_level dataloader_drop_last num_labels
    steps size file names decay data output logging_first_step eval_accumulation_steps lr_scheduler_kwargs
"""


def test_flags_of_others_point_to_ours() -> None:
    for ours, others in POINTERS.items():
        for given in others.split():
            assert re.match(rf"did you mean {ours}[ ?]", hint(f"--{given}", FLAGS)), given


def test_flags_without_an_equal_get_no_wrong_pointer() -> None:
    assert {name: hint(f"--{name}", FLAGS) for name in UNLIKE_OURS.split()} == dict.fromkeys(UNLIKE_OURS.split(), "")
    assert all(hint(f"--{name}", FLAGS).startswith("leave it out: ") for name in NEEDLESS)
    assert hint("--learning_rate", ["--model", "--input"]) == "", "a program without it"
    assert hint("--model_name_or_path", ["--model", "--input"]) == "did you mean --model?"


def test_plain_name() -> None:
    assert {plain_name(Path("data", name)) for name in ("fr.tsv", "fr.csv.gz", "fr.JSONL.GZ")} == {"fr"}
