"""The energy that a run's devices take: NVML's counters of GPUs, RAPL's of processors, else an assumed power.

A GPU's counter is of its whole board. RAPL counts whole packages with their memory, whoever uses them, and only root
may read it on most systems. Neither knows of fans, power supplies, switches or cooling.
"""

import threading
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from configs.schema import Run
from trainer import cluster
from trainer.cluster import Member
from trainer.cost.ledger import Holding
from trainer.machine.devices import CORE_WATTS, of_driver

POWERCAP = Path("/sys/class/powercap")


class Counter(Protocol):
    """Something that counts energy."""

    def joules(self) -> float:
        """Since some fixed moment."""


class Board:
    """NVML's counter of one GPU, in millijoules since the driver was loaded (Volta and later)."""

    def __init__(self, handle: Any, nvml: Any) -> None:
        self._handle, self._nvml = handle, nvml
        self.joules()

    def joules(self) -> float:
        """As the counter stands."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000


class Packages:
    """RAPL's counters of the processor packages of this machine, and of memory where it is counted apart.

    They begin anew every few minutes to hours, so `joules` must be asked more often than that.
    """

    def __init__(self, root: Path) -> None:
        """Find the counters.

        Raises:
            OSError, ValueError: there are none, or they cannot be read.
        """
        self._files = []
        for zone in sorted(root.glob("*-rapl:*")):
            name = (zone / "name").read_text().strip()
            # What else there is lies inside a package ("core", "uncore") or around all of them ("psys").
            if name.startswith("package") or name == "dram":
                self._files.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
        if not self._files:
            raise OSError(f"{root}: no counters of packages")
        self._last = [int(file.read_text()) for file, _ in self._files]
        self._sum, self._lock = 0, threading.Lock()

    def joules(self) -> float:
        """Since this object was made."""
        with self._lock:
            for number, (file, span) in enumerate(self._files):
                count = int(file.read_text())
                self._sum += (count - self._last[number]) % (span + 1)
                self._last[number] = count
            return self._sum / 1e6


class EnergyMeter:
    """Of this rank's device, and on one rank of every machine of its processors too.

    Attributes:
        meters: what measures, for people: "NVML", "RAPL", "NVML + RAPL", or empty.
    """

    def __init__(self, member: Member) -> None:
        self._began = time.monotonic()
        self._counters: list[Counter] = []
        self._devices = 0  # whose energy the counters are, but for a GPU's share of its host
        self.meters = ""
        on_gpu = member.device.type == "cuda"
        board = board_of(member.device) if on_gpu else None
        if board is not None:
            self._counters.append(board)
            self._devices, self.meters = 1, "NVML"
        packages = packages_here() if member.speaks else None
        if packages is not None and (board is not None or not on_gpu):
            self._counters.append(packages)
            self._devices = self._devices or cluster.local_world()
            self.meters = " + ".join(filter(None, (self.meters, "RAPL")))
        self._first = [counter.joules() for counter in self._counters]
        self._known = 0.0, 0.0

    def read(self) -> tuple[float, float]:
        """Joules since the meter was made, and the device-seconds that they are of; both 0 where nothing measures.

        A counter that fails later leaves the figures where they were.
        """
        try:
            counts = [counter.joules() for counter in self._counters]
        except Exception:  # of the driver's library or of the file system; a figure is not worth a run
            self._counters = []
            return self._known
        if counts:
            joules = sum(count - first for count, first in zip(counts, self._first, strict=True))
            self._known = joules, self._devices * (time.monotonic() - self._began)
        return self._known


def board_of(device: torch.device) -> Board | None:
    """The counter of a GPU of torch's; None where NVML, its package nvidia-ml-py or the counter is not there."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return Board(pynvml.nvmlDeviceGetHandleByUUID(uuid_of(device)), pynvml)
    except Exception:  # NVML has a class for each of its errors, and the package may be any
        return None


def uuid_of(device: torch.device) -> str:
    """A GPU's name that holds whatever CUDA_VISIBLE_DEVICES says, as NVML takes it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def packages_here() -> Packages | None:
    """The counters of this machine's processors; None where there are none to read."""
    try:
        return Packages(POWERCAP)
    except (OSError, ValueError):
        return None


def assumed_watts(member: Member, wish: float) -> float | None:
    """The power of one device where nothing measures it: the run's wish, else by its name, None if it is unknown.

    Of a GPU its board's nominal power; of a rank on processors its share of the cores, at `CORE_WATTS` each.
    """
    if wish:
        return wish
    if member.device.type == "cuda":
        found = of_driver(member.device_name)
        return found.watts if found is not None else None
    return CORE_WATTS * cluster.cores() / cluster.local_world()


def holding(run: Run, member: Member, meter: EnergyMeter) -> Holding:
    """What an attempt of a run holds, for its ledger."""
    wish = run.cluster
    watts = assumed_watts(member, wish.watts)
    return Holding(member.device_name, member.peak, wish.price or None, wish.currency, watts, meter.meters)
