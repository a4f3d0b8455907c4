"""Launch train.py with TorchX (`pip install torchx`), on this machine or on a cluster.

    torchx run -s local_cwd scripts/torchx_app.py:train --nproc 2 -- --device cpu --data-dir sample_data
    torchx run -s slurm -cfg time=04:00:00 scripts/torchx_app.py:train --nodes 2 --nproc 8 --gpu 8 --cpu 64

Options before `--` configure this component; those after it go to train.py. Launch it from the project's
folder, which all nodes must see: TorchX runs in the current folder, and tells a component no other.
"""

# No `from __future__ import annotations`: TorchX reads the types of the parameters as they are.
import random
import shlex
import sys
from pathlib import Path

from torchx import specs


def train(
    *args: str,
    nproc: int = 1,
    nodes: int = 1,
    cpu: int = 0,
    gpu: int = 0,
    mem_mb: int = 0,
    port: int = 0,
    python: str = sys.executable,
) -> specs.AppDef:
    """Train on one or many nodes, with torchrun on each; TorchX turns every parameter into an option.

    Args:
        args: options of train.py
        nproc: processes per node
        nodes: nodes
        cpu: cores per node to ask the scheduler for (0: its default)
        gpu: GPUs per node to ask the scheduler for
        mem_mb: memory per node to ask the scheduler for, in MB (0: its default)
        port: of the first node, where the processes find one another (0: any from 20000 to 29999)
        python: of the environment that has this project installed (default: TorchX's own)
    """
    if not Path("train.py").is_file():
        print(f"error: no train.py in {Path.cwd()}; launch this from the project's folder", file=sys.stderr)
        sys.exit(2)
    # The scheduler names the variable that holds the first node; a shell there must look it up. "$$" is TorchX's "$".
    head_node = "127.0.0.1" if nodes == 1 else f'"$${{{specs.macros.rank0_env}:-127.0.0.1}}"'
    port = port or random.randrange(20_000, 30_000)  # below those that Linux hands out by itself
    command = [python, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={nproc}"]
    launcher = f"--node_rank={specs.macros.replica_id} --master_addr={head_node} --master_port={port}"
    words = [word.replace("$", "$$") for word in ("train.py", *args)]
    role = specs.Role(
        name="train",
        image="",  # where it runs: the current folder
        entrypoint="bash",
        args=["-c", f"exec {shlex.join(command)} {launcher} {shlex.join(words)}"],
        # Without it torchrun warns; train.py shares a node's cores among its processes by itself.
        env={"OMP_NUM_THREADS": str((cpu - 1) // nproc + 1 if cpu else 1)},
        num_replicas=nodes,
        resource=specs.Resource(cpu=cpu, gpu=gpu, memMB=mem_mb),
    )
    return specs.AppDef(name="sst2-xlmr", roles=[role])
