"""What a machine of the run does beside training: one rank of every machine writes it down every few seconds.

`system/<host>.jsonl` of the run's folder: the time, the updates made, and the figures that MLflow's own monitor takes,
under its names. GPUs are numbered as this process sees them.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.cost.energy import EnergyMeter, uuid_of
from trainer.tracking.destination import SYSTEM
from trainer.tracking.journal import Journal


class Machine:
    """This machine, as one rank on it sees it."""

    def __init__(self, folder: Path, step: Callable[[], int], energy: EnergyMeter) -> None:
        """Begin to count.

        Args:
            folder: of the run.
            step: gives the updates made.
            energy: is read too: the counters of processors begin anew in minutes.
        """
        self._folder, self._step, self._energy = folder, step, energy
        self._network = traffic()
        self._boards = boards()
        psutil.cpu_percent()  # the first call begins the interval that the next one tells of

    def line(self) -> dict[str, Any]:
        """What it does now."""
        self._energy.read()
        return {"step": self._step(), "time": time.time(), **self._host(), **self._gpus()}

    def _host(self) -> dict[str, float]:
        """Processors, memory, network since the start, and the disk of the run's folder."""
        try:
            memory, (received, sent), space = psutil.virtual_memory(), traffic(), os.statvfs(self._folder)
        except (OSError, RuntimeError, psutil.Error):  # no /proc, or the folder is away for a moment
            return {}
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "network_receive_megabytes": (received - self._network[0]) / 1e6,
            "network_transmit_megabytes": (sent - self._network[1]) / 1e6,
            "disk_available_megabytes": space.f_bavail * space.f_frsize / 1e6,
        }
        return {name: round(value, 1) for name, value in values.items()}

    def _gpus(self) -> dict[str, float]:
        """Use, memory, power and temperature of each GPU; one that does not answer is left out from then on."""
        values: dict[str, float] = {}
        for number in list(self._boards):
            try:
                values |= gpu(number, self._boards[number])
            except Exception:  # NVML has a class for each of its errors
                del self._boards[number]
        return values


def traffic() -> tuple[int, int]:
    """Bytes that this machine has received and sent; 0 where it has no network."""
    counters = psutil.net_io_counters()
    return (counters.bytes_recv, counters.bytes_sent) if counters is not None else (0, 0)


def boards() -> dict[int, Any]:
    """NVML's handle of each GPU that this process sees; empty where there is none, or no package nvidia-ml-py."""
    if not torch.cuda.is_available():
        return {}
    try:
        import pynvml

        pynvml.nvmlInit()
        devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
        return {device.index: pynvml.nvmlDeviceGetHandleByUUID(uuid_of(device)) for device in devices}
    except Exception:  # see above
        return {}


def gpu(number: int, handle: Any) -> dict[str, float]:
    """What NVML says of one GPU."""
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        f"gpu_{number}_utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        f"gpu_{number}_memory_usage_megabytes": round(memory.used / 1e6, 1),
        f"gpu_{number}_memory_usage_percentage": round(memory.used / memory.total * 100, 1),
        f"gpu_{number}_power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        f"gpu_{number}_temperature_celsius": float(
            pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        ),
    }


@contextlib.contextmanager
def watched(folder: Path, every: float, step: Callable[[], int], energy: EnergyMeter) -> Iterator[None]:
    """Around the training on the rank that speaks for its machine.

    Args:
        every: seconds between two lines; 0: nothing is written.
    """
    if not every:
        yield
        return
    path = folder / SYSTEM / f"{socket.gethostname()}.jsonl"
    journal = Journal(path, Machine(folder, step, energy).line, every, at_once=False)
    try:
        yield
    finally:
        journal.close()
