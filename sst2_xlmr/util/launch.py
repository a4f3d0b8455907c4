"""How this program was started: directly, by torchrun (which may restart it) or by SLURM."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from sst2_xlmr.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # the checkout, or site-packages


def command(program: str) -> str:
    """Return the command to start a program (e.g. `train`) from this folder in the way this one was started."""
    started, script = Path(sys.argv[0]), ROOT / ("train.py" if program == "train" else f"scripts/{program}.py")
    words = f"-m sst2_xlmr {program}"
    if Path(os.path.realpath(started)).parent in (ROOT, ROOT / "scripts") and script.is_file():
        words = shlex.quote(str(script) if started.is_absolute() else os.path.relpath(script))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > 1:
        torchrun = "torchrun" if shutil.which("torchrun") else f"{sys.executable} -m torch.distributed.run"
        return f"{torchrun} --nproc_per_node={processes} {words}"
    if started.name == "sst2-xlmr":
        return f"{'sst2-xlmr' if shutil.which('sst2-xlmr') else shlex.quote(sys.argv[0])} {program}"
    python = (getattr(sys, "orig_argv", None) or ["python"])[0]  # since Python 3.10
    return f"{python} {words}"


def this_command() -> str:
    """Return this program's name for its usage message."""
    if Path(sys.argv[0]).name in ("sst2-xlmr", "__main__.py") and len(sys.argv) > 1:
        return f"sst2-xlmr {sys.argv[1]}"
    return Path(sys.argv[0]).name


def is_restarted(output_dir: str | None) -> bool:
    """Whether torchrun (`--max-restarts`) has restarted the command, which must continue its own run."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 and output_dir is None:
        raise UserError("torchrun --max-restarts needs --output-dir, so that a restart can resume the run")
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return restarts > 0 and output_dir is not None and Path(output_dir, "config.json").is_file()


def check_tasks() -> None:
    """Raise `UserError` if srun started several processes that do not form a process group."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # of this srun; SLURM_NTASKS is the whole job's
    if tasks != "1" and "SLURM_PROCID" in os.environ and not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_PROCID"])  # so that only the first task reports it
        cure = "start one torchrun per node (see scripts/train.sbatch), or set RANK=0 for independent runs"
        raise UserError(f"srun started {tasks} tasks, which would train separately; {cure}")
