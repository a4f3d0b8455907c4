"""Stopping on a signal: it sets a flag, and all ranks agree on the step after which they stop."""

import signal
from typing import Any

import torch
import torch.distributed as dist

from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import SIGNALS


class StopRequest:
    """Inside this context, a signal does not end the process but is remembered; later signals are ignored."""

    def __init__(self, world: World) -> None:
        self.signal = 0  # the signal's number, from this rank or, once the ranks have agreed, from any
        self._world = world
        self._votes = torch.zeros(1, dtype=torch.int32)
        self._pending_vote: Any = None
        self._former_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._former_handlers = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._former_handlers.items():
            # After one signal, another must not kill the process while it ends.
            signal.signal(number, signal.SIG_IGN if self.signal else handler)
        if self._pending_vote is not None and kind is None:
            self._pending_vote.wait()

    def _remember(self, number: int, _: object) -> None:
        self.signal = self.signal or number

    def vote(self) -> bool:
        """Return whether to stop now, the same on every rank. A collective: all ranks must call it equally often.

        It returns the result of the previous vote, so that no rank waits for another: they stop one call later.
        """
        if self._world.world_size == 1:
            return self.signal != 0
        if self._pending_vote is not None:
            self._pending_vote.wait()
            self._pending_vote = None
            if int(self._votes):
                self.signal = int(self._votes)
                return True
        self._votes.fill_(self.signal)
        self._pending_vote = dist.all_reduce(self._votes, dist.ReduceOp.MAX, self._world.control_group, async_op=True)
        return False
