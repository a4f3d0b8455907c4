"""Memory of several processes. What training makes of it is tested in test_train.py; here, what each process sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import launcher, started

from sst2_xlmr.distributed import World
from sst2_xlmr.optim import part_of
from sst2_xlmr.shared_memory import ALIGNMENT, aligned_bytes, shared_bytes

PROGRAM = """
import os, sys
import torch
from sst2_xlmr import distributed
from sst2_xlmr.shared_memory import Meeting, Places, aligned_bytes, shared_bytes
if sys.argv[1] == "none":
    del os.memfd_create
elif sys.argv[1] == "another" and os.environ["RANK"] == "1":
    from_main, file = distributed.from_main, os.memfd_create("another")
    os.ftruncate(file, 1 << 16)
    from sst2_xlmr import shared_memory
    def another(world, facts):
        facts = from_main(world, facts)
        return f"/proc/{os.getpid()}/fd/{file}", facts[1]
    shared_memory.from_main = another
with distributed.start("cpu", 1, 1) as world:
    like = [torch.zeros(3, 5), torch.zeros(7, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int16)]
    size = aligned_bytes(like)
    memory = shared_bytes(world, world.world_size * size)
    if memory is None:
        print("none")
        sys.exit()
    places, meeting = Places(memory), Meeting(world)
    mine = places.take_for_ranks(world, like)
    assert all(not tensor.any() for tensor in mine)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mine)
    for tensor in mine:
        tensor.fill_(world.rank + 1)
    assert meeting.sum(world.rank + 0.5) == 2.0
    everything = Places(memory)
    for rank in range(2):
        for tensor in like:
            found = everything.take(tensor)
            assert found.shape == tensor.shape and found.dtype == tensor.dtype and (found == rank + 1).all()
    meeting.sum(0)
    print("seen")
"""


@pytest.mark.parametrize(("how", "said"), [("all", "seen"), ("none", "none"), ("another", "none")])
def test_processes_see_what_the_others_write(tmp_path: Path, how: str, said: str) -> None:
    """Or agree that they cannot: no such memory on this system, or another process's file by that name."""
    program, log = tmp_path / "program.py", tmp_path / "log"
    program.write_text(PROGRAM)
    with started([*launcher(2), str(program), how], log) as process:
        assert process.wait(timeout=60) == 0, log.read_text()
    assert log.read_text().count(said) == 2


def test_processes_of_several_nodes_have_none() -> None:
    assert shared_bytes(World(0, 2, 0, 1, torch.device("cpu")), 64) is None


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 4096])
def test_parts_make_the_whole(ranks: int, n: int) -> None:
    parts = [part_of(n, World(rank, ranks, rank, ranks, torch.device("cpu"))) for rank in range(ranks)]
    assert [number for start, stop in parts for number in range(start, stop)] == list(range(n))
    assert all(start % 64 == 0 or start == n for start, _ in parts), "no cache line is written by two"


def test_no_two_tensors_share_a_cache_line() -> None:
    assert aligned_bytes([torch.zeros(1), torch.zeros(16), torch.zeros(17)]) == (1 + 1 + 2) * ALIGNMENT
    assert aligned_bytes([torch.zeros(17, dtype=torch.bfloat16)], torch.float32) == 2 * ALIGNMENT
