"""Requests to stop: a signal sets a flag, the ranks agree on it between two steps."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from trainer.cluster import Member

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopFlag:
    """Whether this rank was asked to stop, and whether any rank was."""

    def __init__(self) -> None:
        self.asked = False
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def agreed(self, member: Member) -> bool:
        """Whether some rank had been asked when this was last called; call it once per step on every rank.

        The exchange started by one call is read by the next, so that no rank waits for the slowest here.
        """
        answer = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor([float(self.asked)])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=member.control, async_op=True)
        assert work is not None
        self._pending = (work, flag)
        return answer

    def finish(self) -> None:
        """Complete the exchange that is under way, before the process group is left."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
