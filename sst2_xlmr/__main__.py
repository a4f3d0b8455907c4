"""The command `sst2-xlmr`, also `python -m sst2_xlmr`. It imports a subcommand's module only to run it."""

import importlib
import os
import sys

import sst2_xlmr
from sst2_xlmr.util import versions
from sst2_xlmr.util.cores import limit_threads, yield_busy_cores
from sst2_xlmr.util.errors import UserError, exit_on_user_error
from sst2_xlmr.util.flag_hints import hint

HELP = """usage: sst2-xlmr COMMAND [OPTIONS]

Fine-tune XLM-R for text classification, and use what was trained.

commands:
{commands}

`sst2-xlmr COMMAND --help` lists the options of a command.
"""


def main(program: str | None = None) -> None:
    """Run a program, named by `program` or else by the first word of the command line."""
    exit_on_user_error(lambda: _run(program, sys.argv[1:]))


def _run(program: str | None, words: list[str]) -> None:
    options = importlib.import_module("sst2_xlmr.programs.options")  # here, where a missing package becomes one line
    if program is None:
        descriptions = {name: add.__doc__ for name, add in options.PROGRAMS.items()}
        programs = {"train": "Train on labelled texts.", **descriptions}
        first, words = words[0] if words else "", words[1:]
        if first in ("-h", "--help"):
            print(HELP.format(commands="\n".join(f"  {name:10}{what}" for name, what in programs.items())), end="")
            return
        if first == "--version":
            print(f"sst2-xlmr {sst2_xlmr.__version__}, {versions.versions()}")
            return
        if first not in programs:
            fix = hint(first, programs) or f"there are {', '.join(programs)}"
            raise UserError((f"unknown command {first}" if first else "no command is given") + f"; {fix}")
        program = first
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # of this srun; SLURM_NTASKS is the whole job's
    is_lone = "SLURM_PROCID" in os.environ and not {"RANK", "WORLD_SIZE"} & os.environ.keys()
    if program == "train" and tasks != "1" and is_lone:
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_PROCID"])  # so that only the first task reports it
        fix = "start one torchrun per node (see scripts/train.sbatch), or set RANK=0 for independent runs"
        raise UserError(f"srun started {tasks} tasks, which would train separately; {fix}")
    if os.environ.get("WORLD_SIZE", "1") == "1":  # else one of the processes says it, which is found below
        options.refuse_wrong_flags(program, words)
        limit_threads()
    yield_busy_cores()
    module = importlib.import_module(f"sst2_xlmr.{'' if program == 'train' else 'programs.'}{program}")
    module.main(words)


if __name__ == "__main__":
    main()
