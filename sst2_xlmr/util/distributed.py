"""Process groups: this process's rank, collectives, errors raised on all ranks, and work for one process per node."""

import math
import os
import pickle
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from sst2_xlmr.util.cores import available_cores
from sst2_xlmr.util.device import choose_device
from sst2_xlmr.util.errors import UserError, raise_on_all

Result = TypeVar("Result")

# gloo's messages when a peer is gone or silent; it has no exception type for that.
_GLOO_ERROR = "gloo|Operation timed out|Connection (closed|reset|refused)|Broken pipe|Timed out waiting"
_GLOO_ERROR += "|Socket (closed|Timeout)"
# Timeout of `slow_group`, for downloads, tokenization and slow disks, which take longer than any step.
SLOW_TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run; by default it is the only one."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    control_group: Any = None  # gloo group for Python objects; None with one process
    slow_group: Any = None  # the same, with `SLOW_TIMEOUT`
    timeout_s: float = math.inf  # of silence, until a process counts as lost


def _read_environment() -> dict[str, int]:
    """Return rank, world_size, local_rank and local_world_size from torchrun's variables; UserError if inconsistent."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "0"}
    texts = {name: os.environ.get(name, default) for name, default in defaults.items()}
    numbers = [int(text) if text.isdecimal() else -1 for text in texts.values()]
    rank, world_size, local_rank, local_world_size, port = numbers
    is_consistent = 0 <= rank < world_size and 0 <= local_rank < local_world_size
    if world_size > 1:
        is_consistent &= "RANK" in os.environ and bool(os.environ.get("MASTER_ADDR")) and 0 < port < 2**16
    if not is_consistent:
        has = ", ".join(f"{name}={os.environ[name]}" for name in (*texts, "MASTER_ADDR") if name in os.environ)
        needed = "a RANK below WORLD_SIZE, MASTER_ADDR and MASTER_PORT are needed"
        fix = "start train.py with torchrun, which sets them, or unset them to train with one process"
        raise UserError(f"the environment has {has}, but {needed}; {fix}", on_this_rank=True)
    return {name.lower(): number for name, number in zip(texts, numbers[:4])}


def thread_count(threads: int, processes: int) -> int:
    """Return the threads per process of a node: `threads` if not 0, else OMP_NUM_THREADS, else a share of the cores."""
    variable = os.environ.get("OMP_NUM_THREADS", "")
    if threads or (variable.isdecimal() and int(variable) > (1 if "TORCHELASTIC_RUN_ID" in os.environ else 0)):
        return threads or int(variable)  # torchrun sets 1, which would leave most cores idle
    share = max(1, available_cores() // processes)
    return min(share, torch.get_num_threads()) if processes == 1 else share


@contextmanager
def init_distributed(device_name: str, threads: int, timeout_minutes: float) -> Iterator[World]:
    """Join the process group that torchrun's environment describes, if any, and leave it on exit."""
    place = _read_environment()
    timeout, store = timedelta(minutes=timeout_minutes), None
    if place["world_size"] > 1:
        # Restarted processes must not find their predecessors' addresses in the store, which torch 2.13 with static
        # rendezvous does not prevent; hence the prefix. Only with one node, as each node counts its own restarts.
        is_one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_one_node else "0"
        store = dist.PrefixStore(f"attempt_{attempt}", next(rendezvous("env://", timeout=timeout))[0])
        device_name = _agree_on_device(device_name, place["rank"], store)
    device = choose_device(device_name, place["local_rank"], place["local_world_size"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(thread_count(threads, place["local_world_size"]))
    if store is None:
        yield World(device, **place)
        return
    # On a timeout, NCCL aborts the process with a dump; with a minute more, the ranks' vote raises its error first.
    backend, more = ("nccl", timedelta(minutes=1)) if device.type == "cuda" else ("gloo", timedelta())
    rank, world_size = place["rank"], place["world_size"]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout + more)
    lost = False
    try:
        control_group, slow_group = (dist.new_group(backend="gloo", timeout=t) for t in (timeout, SLOW_TIMEOUT))
        yield World(device, **place, control_group=control_group, slow_group=slow_group, timeout_s=timeout_minutes * 60)
    except UserError as error:
        lost = error.on_this_rank  # the others still wait for this rank
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search(_GLOO_ERROR, str(error)):
            raise
        lost = True
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        text = f"rank {rank}: lost contact with another process ({reason}): it exited, or did not respond for"
        text += f" {timeout_minutes:g} minutes; see its error above, if any; what is on disk is intact: use --resume"
        raise UserError(text, on_this_rank=True, status=1) from error
    finally:
        if not lost:  # otherwise it would wait for the lost process
            dist.destroy_process_group()


def _agree_on_device(name: str, rank: int, store: dist.Store) -> str:
    """Return `--device`, with `auto` resolved as on rank 0; UserError if this rank has no such device."""
    kind = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if rank == 0:
        store.set("device", kind)
    agreed = store.get("device").decode()
    if (name != "auto" and kind != agreed) or (agreed == "cuda" and kind == "cpu"):
        text = f"rank {rank} would compute on {kind}, but rank 0 on {agreed}; give all the same --device, e.g. cpu"
        raise UserError(text, on_this_rank=True)
    return agreed


# torch 2.3.1 deadlocks if a gloo group is destroyed while one of its threads frees a tensor that Python no longer
# holds, which needs the GIL. A thread may lag behind by a collective or two, so the tensors of the last few are kept.
_held: dict[Any, deque[Any]] = defaultdict(lambda: deque(maxlen=4))


def sum_over_ranks(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place, with bitwise equal results."""
    if world.world_size > 1:
        dist.all_reduce(tensor)
        _held["sum"].append(tensor)
    return tensor


def broadcast(world: World, item: Any, group: Any = None, source: int = 0, limit_s: float | None = None) -> Any:
    """Return rank `source`'s `item` on all ranks; they wait until the group's timeout, the source at most `limit_s`."""
    if world.world_size == 1:
        return item
    group, is_source = group or world.control_group, world.rank == source
    content = torch.frombuffer(bytearray(pickle.dumps(item if is_source else None)), dtype=torch.uint8)
    size = torch.tensor([len(content)])
    limit = [timedelta(seconds=limit_s)] if is_source and limit_s is not None else []
    dist.broadcast(size, source, group=group, async_op=True).wait(*limit)
    if not is_source:
        content = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, source, group=group, async_op=True).wait(*limit)
    _held[group, source].append((size, content))
    return pickle.loads(content.numpy().tobytes())


def gather_objects(world: World, item: Any, group: Any = None) -> list[Any]:
    """Return every rank's `item`, by rank; see `broadcast`."""
    return [broadcast(world, item, group, source) for source in range(world.world_size)]


def check_same(world: World, values: dict[str, Any], fix: str) -> None:
    """Check that ranks with values have rank 0's; UserError on every rank, about the first value that differs."""
    first, *others = gather_objects(world, values)
    for rank, own in enumerate(others, 1):
        for name in own:
            if own[name] != first[name]:
                raise_on_all(f"rank {rank} has {name} {own[name]}, rank 0 {first[name]}; {fix}")


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, str]:
    """Return (result of `work`, ""), or (None, text of its UserError)."""
    try:
        return work(), ""
    except UserError as error:
        return None, str(error)


def local_rank0_first(world: World, prepare: Callable[[], Result]) -> Result:
    """Run `prepare`, which caches on disk, on one process per node, then on the others; all ranks raise its errors."""
    result = None
    for is_turn in (world.local_rank == 0, world.local_rank > 0):
        result, problem = _attempt(prepare) if is_turn else (result, "")
        if problem := next(filter(None, gather_objects(world, problem, world.slow_group)), ""):
            raise_on_all(problem)
    assert result is not None
    return result


def on_rank0(world: World, work: Callable[[], Result]) -> Result | None:
    """Run `work` on rank 0 while the others wait; returns its result there, else None. All ranks raise its error."""
    result, problem = _attempt(work) if world.rank == 0 else (None, "")
    if problem := broadcast(world, problem, world.slow_group, limit_s=world.timeout_s):
        raise_on_all(problem)
    return result
