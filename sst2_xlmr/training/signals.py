"""Stop when asked to: a signal sets a flag, and all ranks agree on the step after which they stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from sst2_xlmr.util.distributed import World, wait_for_step
from sst2_xlmr.util.errors import SIGNALS


class StopRequest:
    """While it is entered, a signal does not end the process but is remembered; a second one changes nothing."""

    def __init__(self, world: World) -> None:
        self.number = 0  # of the signal that came, on this rank or, once they have agreed, on any
        self._world = world
        self._votes = torch.zeros(1, dtype=torch.int32)
        self._counting: Any = None
        self._step: torch.cuda.Event | None = None  # on the GPU's queue, at the last vote
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._former = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._former.items():  # ignored if one came: a second must not kill a process that ends
            signal.signal(number, signal.SIG_IGN if self.number else handler)
        if self._counting is not None and kind is None:
            self._counting.wait()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    def is_agreed(self) -> bool:
        """Whether to stop now: the same answer on every rank. All ranks must ask equally often.

        The vote before this one is counted, so that no rank waits for another: they stop one question later.
        """
        if self._world.world_size == 1:
            return self.number != 0
        if self._counting is not None:
            self._counting.wait()
            self._counting = None
            if int(self._votes):
                self.number = int(self._votes)
                return True
        if self._world.device.type == "cuda":
            # A rank votes only once its GPU has done the step before this one, so that one that hangs does not vote.
            if self._step is not None:
                wait_for_step(self._step, self._world)
            self._step = torch.cuda.Event()
            self._step.record()
        self._votes.fill_(self.number)
        self._counting = dist.all_reduce(self._votes, dist.ReduceOp.MAX, self._world.control, async_op=True)
        return False
