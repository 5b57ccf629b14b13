"""Seconds of every block inside real training steps, forward and backward.

A block's backward pass begins when the gradient of its output is whole, and ends when that of its input is. What it
makes again lies in between. On a GPU these are times of the device, from events that nobody waits for; on a CPU the
time that this thread has a core where torch computes on one thread, so that other processes do not count, else the
clock's.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.coatnet import CoAtNet
from trainer.engine.recompute import RunBlock

Seconds = dict[str, tuple[float, float]]  # by block: of all its forward passes, of all its backward passes


class BlockTimes:
    """Marks the passes of blocks while it is between the engine and them."""

    def __init__(self, model: CoAtNet, device: torch.device) -> None:
        self._names = {id(block): name for name, block in model.flat}
        self._cuda = device.type == "cuda"
        self._clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self._forward: list[tuple[str, Any, Any]] = []
        self._begun: dict[str, list[Any]] = defaultdict(list)
        self._ended: dict[str, list[Any]] = defaultdict(list)
        self._listening = False
        self._handle: Any = None
        if model.part[0] == 0:
            # The pictures have no gradient: the last thing of the first block is that of its first weight.
            name, block = model.flat[0]
            first: Any = next(block.parameters())
            self._handle = first.register_hook(lambda _: self._end(name) if self._listening else None)

    def around(self, call: RunBlock | None) -> RunBlock:
        """How the network calls its blocks, with marks before and behind each."""
        self._listening = True

        def marked(block: Callable[..., Any], x: Tensor, drop: Tensor | None) -> Tensor:
            name = self._names[id(block)]
            began = self._mark()
            y: Tensor = block(x, drop) if call is None else call(block, x, drop)
            self._forward.append((name, began, self._mark()))
            if y.requires_grad:
                hooked: Any = y
                hooked.register_hook(lambda _: self._begun[name].append(self._mark()))
                if x.requires_grad:
                    entering: Any = x
                    entering.register_hook(lambda _: self._end(name))
            return y

        return marked

    def take(self) -> Seconds:
        """The sums since the last call. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {name: [0.0, 0.0] for name in self._names.values()}
        for name, began, ended in self._forward:
            found[name][0] += self._between(began, ended)
        for name, begun in self._begun.items():
            for began, ended in zip(begun, self._ended[name], strict=True):
                found[name][1] += self._between(began, ended)
        self._forward, self._begun, self._ended = [], defaultdict(list), defaultdict(list)
        return {name: (forward, backward) for name, (forward, backward) in found.items()}

    def close(self) -> None:
        """Listen no more."""
        self._listening = False
        if self._handle is not None:
            self._handle.remove()

    def _end(self, name: str) -> None:
        if len(self._ended[name]) < len(self._begun[name]):
            self._ended[name].append(self._mark())

    def _mark(self) -> Any:
        """Now, on the device or on the clock."""
        if not self._cuda:
            return self._clock()
        event: Any = torch.cuda.Event
        made = event(enable_timing=True)
        made.record()
        return made

    def _between(self, began: Any, ended: Any) -> float:
        return float(began.elapsed_time(ended)) / 1000 if self._cuda else ended - began
