"""The command line: builds a `Config` from the defaults, then a saved `config.json`, then flags."""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

from sst2_xlmr import __version__
from sst2_xlmr.config import GROUPS, LOCK_NAME, OPTIONS, TYPES, Config, check, flag, named_file, shown
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import is_scratch, read_json
from sst2_xlmr.util.flag_hints import hint

ROOT = Path(__file__).resolve().parents[1]  # the checkout, or site-packages


def train_command() -> str:
    """Return the command that starts training from this folder in the way that this program was started."""
    started, script, words = Path(sys.argv[0]), ROOT / "train.py", "-m sst2_xlmr train"
    if os.path.realpath(started) == str(script):
        words = shlex.quote(str(script) if started.is_absolute() else os.path.relpath(script))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > 1:
        torchrun = "torchrun" if shutil.which("torchrun") else f"{sys.executable} -m torch.distributed.run"
        return f"{torchrun} --nproc_per_node={processes} {words}"
    if started.name == "sst2-xlmr":
        return f"{'sst2-xlmr' if shutil.which('sst2-xlmr') else shlex.quote(sys.argv[0])} train"
    return f"{(sys.orig_argv or ['python'])[0]} {words}"


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with a hint for a mistyped flag."""

    def __init__(self, **settings: Any) -> None:
        program = Path(sys.argv[0]).name
        if program in ("sst2-xlmr", "__main__.py") and len(sys.argv) > 1:
            program = f"sst2-xlmr {sys.argv[1]}"
        super().__init__(**{"prog": program, "allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            word = (message.split(":", 1)[1].split() or ["''"])[0].split("=")[0]
            flags = [known for known in self._option_string_actions if known.startswith("--")]
            fix = hint(word, flags) if word.startswith("--") else ""
            raise UserError(f"unknown argument {word}; {fix or 'see --help'}")
        raise UserError(f"{message}; see --help")


def option_type(name: str) -> tuple[str, bool]:
    """Return the type that an option's annotation names, and whether it takes several values."""
    annotation = str(OPTIONS[name].type).split(" | ")[0]
    return annotation.replace("list[", "").rstrip("]"), annotation.startswith("list[")


def add_options(parser: Any, *names: str) -> None:
    """Add options of `Config` to a parser or a group; an option that was not given is missing from the namespace."""
    for name in names:
        help, default, (kind, is_list) = OPTIONS[name].metadata["help"], getattr(Config(), name), option_type(name)
        how: dict[str, Any] = {"nargs": "+", "action": "extend"} if is_list else {}
        if kind == "bool":
            how["action"] = argparse.BooleanOptionalAction
            default = None if default is None else "on" if default else "off"
        else:
            how["type"] = TYPES.get(kind, str)
            how["metavar"], _, help = help.partition(": ")
        if name == "check":
            how |= {"nargs": "?", "const": os.devnull}
        help += "" if default in (None, []) else f" [{shown(default)}]"
        parser.add_argument(flag(name), default=argparse.SUPPRESS, help=help.replace("%", "%%"), **how)


def positive(text: str) -> int:
    """Parse a number from 1, for argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def read_config_file(path: Path, resume: bool = False) -> dict[str, Any]:
    """Read and check a saved `config.json`; to `resume` its run, the first two numbers of the version must agree."""
    values = read_json(path, "--config takes the config.json of a run")
    version = str(values.pop("sst2_xlmr", "before 0.2"))
    if resume and version.split(".")[:2] != __version__.split(".")[:2]:
        fix = f"resume it with that version, or start over with --config {path} --output-dir NEW_DIR"
        raise UserError(f"version {version} wrote the run in {path.parent}, and this is {__version__}: {fix}")
    for name, value in values.items():
        if name not in OPTIONS:
            raise UserError(f"{path}: unknown option {name!r}; {hint(name, OPTIONS) or 'remove it'}")
        kind, is_list = option_type(name)
        if is_list or kind == "CommaSeparated":
            has_type = isinstance(value, list) and all(isinstance(item, str) for item in value)
        else:
            has_type = type(value) in {"bool": (bool,), "int": (int,), "float": (int, float)}.get(kind, (str,))
        if not has_type and not (value is None and str(OPTIONS[name].type).endswith("None")):
            raise UserError(f"{path}: {name!r} has the value {value!r}, which has the wrong type")
    return values


def with_files(words: list[str]) -> list[str]:
    """Replace each `@FILE` by the words in that file, which are quoted as in a shell; `#` starts a comment."""
    result = []
    for word in words:
        try:
            is_file = word.startswith("@") and word != "@"  # a delimiter
            result += shlex.split(Path(word[1:]).read_text("utf-8"), comments=True) if is_file else [word]
        except OSError as error:
            raise UserError(f"cannot read {word[1:]}, named by {word}: {error.strerror}") from None
        except ValueError as error:  # an unclosed quotation, or bytes that are not UTF-8
            raise UserError(f"{word[1:]} does not hold options: {error}") from None
    return result


def command_line_of(config: Config) -> list[str]:
    """Return the command-line words of all options that differ from their defaults."""
    words: list[str] = []
    changed = {name: value for name, value in vars(config).items() if value != getattr(Config(), name)}
    for name, value in changed.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else f"--no-{name.replace('_', '-')}")
        elif isinstance(value, list) and option_type(name)[1]:
            words += [flag(name), *value]
        else:
            words += [flag(name), shown(value)]
    return words


def train_parser() -> OneLineParser:
    epilog = "@FILE takes options from a file, such as those in scripts/recipes/; options after it override them."
    epilog += " Also: torchrun --nproc_per_node=2 train.py ...; sbatch scripts/train.sbatch"
    parser = OneLineParser(description="Fine-tune XLM-R for text classification; SST-2 by default.", epilog=epilog)
    for heading, names in GROUPS.items():
        add_options(parser.add_argument_group(heading), *names)
    run = parser.add_argument_group("starting from an earlier run")
    run.add_argument("--config", metavar="FILE", help="take options from a saved config.json; flags override it")
    what = "continue the run in --output-dir from its newest checkpoint, with its own options"
    run.add_argument("--resume", action="store_true", help=what)
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[Config, bool]:
    """Parse and check the command line; returns (config, whether to resume)."""
    flags = vars(train_parser().parse_args(with_files(sys.argv[1:] if argv is None else argv)))
    config_file, resume = flags.pop("config"), flags.pop("resume")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 and "output_dir" not in flags:
        raise UserError("torchrun --max-restarts needs --output-dir, so that a restart can resume the run")
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if is_restart and "output_dir" in flags and Path(flags["output_dir"], "config.json").is_file():
        config_file, resume = None, True  # it must continue its own run
    if resume and config_file:
        raise UserError("--resume reads the run's own config.json; leave out --config")
    base = read_config_file(Path(config_file)) if config_file else {}
    config = _resumed_config(flags) if resume else Config(**{**base, **flags})
    _check_outputs(config, resume)
    check(config)
    # Absolute paths, so that a saved `config.json` means the same in any folder.
    names = ["data_dir", "dev_file", "tensorboard_dir", *(["encoder"] if Path(config.encoder).is_dir() else [])]
    paths: dict[str, Any] = {name: os.path.abspath(value) for name in names if (value := getattr(config, name))}
    for name in ("train_file", "test_file"):
        paths[name] = [os.path.abspath(file) for file in getattr(config, name)]
    paths["eval_file"] = [f"{name}={os.path.abspath(file)}" for name, file in map(named_file, config.eval_file)]
    return dataclasses.replace(config, **paths), resume


def _resumed_config(flags: dict[str, Any]) -> Config:
    """Return the options of the run in `--output-dir`, overridden by flags; UserError for one that must not change."""
    if "output_dir" not in flags:
        raise UserError("--resume needs --output-dir, the folder of the run to continue")
    folder = Path(flags["output_dir"])
    if not (folder / "config.json").is_file():
        fix = "give the --output-dir of a run, or start without --resume"
        raise UserError(f"nothing to resume: {folder / 'config.json'} does not exist; {fix}")
    config = Config(**read_config_file(folder / "config.json", resume=True))
    for name, value in flags.items():
        previous = getattr(config, name)
        if value != previous and not OPTIONS[name].metadata["changeable"]:
            was = "its default" if previous is None else shown(previous)
            fix = "leave it out, or start a new run"
            if name in ("epochs", "max_steps", "early_stopping_patience"):  # to train for longer
                fix += f", e.g. from its model: --encoder {folder / 'model'} --output-dir NEW_DIR"
            problem = f"{flag(name)} {shown(value)} differs from {was}, with which the run in {folder} was started"
            raise UserError(f"{problem}; {fix}")
    return dataclasses.replace(config, **flags)


def _check_outputs(config: Config, resume: bool) -> None:
    """Check that the run's folders can be made, that a new run's is free, and that --check replaces only a report."""
    given = {"output_dir": config.output_dir, "tensorboard_dir": config.tensorboard_dir}
    folders = {name: Path(value) for name, value in given.items() if value is not None}
    for name, folder in folders.items():
        try:
            if name == "output_dir" and not resume and folder.exists():
                files = folder.iterdir() if folder.is_dir() else [folder]
                if not all(is_scratch(file) or file.name == LOCK_NAME for file in files):  # leftovers of a killed start
                    fix = "continue it with --resume or choose another directory"
                    raise UserError(f"--output-dir {folder} already exists; {fix}")
            parent = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise UserError(f"cannot write to {flag(name)} {folder}: {parent} is not a folder you may write to")
        except OSError as error:
            raise UserError(f"cannot write to {flag(name)} {folder}: {error.strerror}") from None
    file = Path(config.check or os.devnull)
    is_report = not file.is_file() or not file.stat().st_size
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        is_report |= all("examples" in split for split in json.loads(file.read_text(encoding="utf-8")).values())
    if not is_report:
        raise UserError(f"--check {file} already exists and is not a report of --check; choose another file")
