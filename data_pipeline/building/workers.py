"""The same function over many items, in this process or in several that end with it."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing.context import BaseContext
from typing import TypeVar

from configs.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4  # items handed out per process before their results are asked for


def spread(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """The results of `function` over `items`, in their order; with one worker in this process.

    `function`, items and results travel between processes, which neither share nor inherit anything (no fork).

    Raises:
        InputError: the number of workers is out of range; and whatever `function` raises.
    """
    if workers < 1:
        raise InputError(f"--workers {workers}: must be at least 1")
    if workers == 1:
        yield from map(function, items)
        return
    left = iter(items)
    pool = ProcessPoolExecutor(workers, mp_context=_context(function), initializer=_start)
    try:
        waiting: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(left, workers * AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(left, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _context(function: Callable[[Item], Result]) -> BaseContext:
    """How processes start: by forkserver, else spawn. Arrow and torch have threads, which a fork would break."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(function, "func", function).__module__])  # once, not once per process
    return context


def _start() -> None:
    """In a new process: Ctrl-C is the parent's affair, one core is its share, and it goes when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent is gone, however it went: after its kill -9 nobody would else stop the writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
