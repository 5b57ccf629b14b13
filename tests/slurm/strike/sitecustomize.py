"""Faults that tests make happen inside a rank, in its main thread, at the moment when they send it a signal.

Python imports a module of this name at its start where it finds one; the tests put this folder on PYTHONPATH of the
jobs that they submit. The code of the run itself knows nothing of it.
"""

import ctypes
import os
import signal
import sys
import threading
import time

RAISE, HANG, HANG_IN_C = signal.SIGRTMIN + 1, signal.SIGRTMIN + 2, signal.SIGRTMIN + 3


def fail(number: int, frame: object) -> None:
    """An exception in the middle of a step."""
    raise RuntimeError("a fault, on purpose")


def hang(number: int, frame: object) -> None:
    """Python code that does not end."""
    while True:
        time.sleep(0.1)


def hang_in_c(number: int, frame: object) -> None:
    """A call that neither ends nor gives Python's lock back, as of a stuck driver; no signal interrupts it."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


if "COATNET_TRY" in os.environ and threading.current_thread() is threading.main_thread():
    for number, handler in ((RAISE, fail), (HANG, hang), (HANG_IN_C, hang_in_c)):
        signal.signal(number, handler)
    examined = "doctor" in sys.orig_argv  # before the try, also as a task of srun
    if os.environ.get("SLURM_PROCID") == os.environ.get("STRIKE_ALWAYS") and not examined:  # a rank that can never run
        threading.Timer(2.0, os._exit, (3,)).start()
