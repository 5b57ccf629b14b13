"""What accelerators can do at best: one table, from the vendors' data sheets. No torch.

Everything that needs a fact of a device reads it here: the planner, MFU, the ledger. What a machine really reaches is
in `trainer/rates.py`.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import InputError, unknown

GB = 1e9
_Fact = TypeVar("_Fact")


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: as `--gpu` takes it.
        words: of the name that the driver gives it, whole.
        peak: dense bf16 FLOP/s with fp32 sums; None where no data sheet says.
        memory: bytes.
        bandwidth: of that memory, bytes/s.
        link: bytes/s one way to the others of its machine: NVLink where there is one, else PCIe.
        host: bytes/s one way to the machine's memory.
        watts: of the board.
        per_node: in a machine as it is usually sold.
        host_memory: of that machine's own memory, bytes.
        source: the data sheet, and where the machine's memory is from.
    """

    name: str
    words: str
    peak: float | None
    memory: float
    bandwidth: float
    link: float
    host: float
    watts: float
    per_node: int
    host_memory: float
    source: str

    @property
    def on_host(self) -> bool:
        """Whether it is the machine's own processor."""
        return self.name == "cpu"


# name, words, TFLOP/s, GB, TB/s, GB/s to neighbours, GB/s to the host, watts, in a machine, source
_ROWS: tuple[tuple[str, str, float, float, float, float, float, float, int, str], ...] = (
    ("h100", "H100", 989.4, 80, 3.35, 450, 64, 700, 8, "NVIDIA H100 data sheet, SXM5"),
    ("h100-pcie", "H100 PCIe", 756, 80, 2.0, 64, 64, 350, 8, "NVIDIA H100 PCIe product brief PB-11133"),
    ("h100-nvl", "H100 NVL", 835, 94, 3.9, 300, 64, 400, 8, "NVIDIA H100 data sheet, NVL"),
    ("h200", "H200", 989.4, 141, 4.8, 450, 64, 700, 8, "NVIDIA H200 data sheet, SXM"),
    ("gh200", "GH200", 989.4, 96, 4.0, 450, 450, 1000, 1, "NVIDIA GH200 data sheet, 96 GB HBM3"),
    ("b200", "B200", 2250, 180, 8.0, 900, 64, 1000, 8, "NVIDIA DGX B200 data sheet, an eighth of it"),
    ("a100", "A100", 312, 80, 2.039, 300, 32, 400, 8, "NVIDIA A100 data sheet, SXM4 80 GB"),
    ("a100-40gb", "A100-SXM4-40GB", 312, 40, 1.555, 300, 32, 400, 8, "NVIDIA A100 data sheet, SXM4 40 GB"),
    ("a100-pcie-40gb", "A100-PCIE-40GB", 312, 40, 1.555, 32, 32, 250, 8, "NVIDIA A100 data sheet, PCIe 40 GB"),
    ("a100-pcie", "A100 80GB PCIe", 312, 80, 1.935, 32, 32, 300, 8, "NVIDIA A100 data sheet, PCIe 80 GB"),
    ("a10", "A10", 125, 24, 0.6, 32, 32, 150, 8, "NVIDIA A10 data sheet"),
    ("a10g", "A10G", 70, 24, 0.6, 32, 32, 300, 8, "AWS G5 instances; NVIDIA A10G"),
    ("l40s", "L40S", 362, 48, 0.864, 32, 32, 350, 8, "NVIDIA L40S data sheet"),
    ("rtx4090", "RTX 4090", 165.2, 24, 1.008, 32, 32, 450, 8, "NVIDIA Ada architecture white paper, appendix A"),
    ("rtx3090", "RTX 3090", 71, 24, 0.936, 32, 32, 350, 8, "NVIDIA GA102 architecture white paper, appendix A"),
)
# GB of memory of such a machine, and whose it is. Of the others twice what its devices have is assumed.
_HOSTS: dict[str, tuple[float, str]] = {
    "h100": (2000, "DGX H100 data sheet"),
    "h200": (2000, "DGX H200 data sheet"),
    "gh200": (480, "GH200 data sheet, the most it has"),
    "b200": (2000, "DGX B200 data sheet, 4,000 at most"),
    "a100": (2000, "DGX A100 640GB data sheet"),
    "a100-40gb": (1000, "DGX A100 320GB data sheet"),
    "a10g": (768, "AWS g5.48xlarge"),
}


def _table() -> dict[str, Device]:
    """The rows as devices, by name."""
    found = {}
    for name, words, flops, size, speed, link, host, watts, count, source in _ROWS:
        beside, whose = _HOSTS.get(name, (2 * count * size, "assumed"))
        found[name] = Device(
            name, words, flops * 1e12, size * GB, speed * 1e12, link * GB, host * GB, watts, count, beside * GB,
            f"{source}; {beside:,.0f} GB of host memory: {whose}",
        )  # fmt: skip
    return found


DEVICES = _table()
CORE_WATTS = 5.0  # of a server processor's core: EPYC 7763 280 W over 64 cores, Xeon 8480+ 350 W over 56


def by_words(table: Mapping[str, _Fact], name: str) -> _Fact | None:
    """What a table by whole words of device names has for one, the longest match; None where it has nothing."""
    matches = [key for key in table if re.search(rf"(?<!\w){re.escape(key)}(?!\w)", name)]  # an A1000 is no A100
    return table[max(matches, key=len)] if matches else None


def of_driver(name: str) -> Device | None:
    """The row of a device by the name that its driver gives it, None if there is none."""
    return by_words({device.words: device for device in DEVICES.values()}, name)


def peak_of(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device by its driver's name, None if it is not in the table."""
    found = of_driver(name)
    return found.peak if found is not None else None


def memory_here() -> int:
    """Bytes of this machine's own memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def of_this_machine(device: Device) -> Device:
    """The device with the memory that this machine has beside it."""
    here = float(memory_here())
    source, _, _ = device.source.partition("; ")
    return replace(device, host_memory=here, source=f"{source}; {here / GB:,.0f} GB of host memory: this machine's")


def processor(ranks: int) -> Device:
    """This machine's processor, of which each of `ranks` processes has a share; its memory is the host's."""
    whole = float(memory_here())
    memory, cores = whole / ranks, len(os.sched_getaffinity(0)) / ranks
    bandwidth = 10e9 * cores
    return Device(
        "cpu", "cpu", None, memory, bandwidth, 2e9, bandwidth, CORE_WATTS * cores, ranks, whole,
        "this machine's memory and cores; its speed is assumed until `coatnet bench step` has measured it",
    )  # fmt: skip


def named(name: str, ranks: int = 1) -> Device:
    """The device that a command line names: a row of the table, `cpu`, or a JSON file with the fields of `Device`.

    Args:
        ranks: processes that share this machine, for `cpu`.

    Raises:
        InputError: no such device, or a file that does not describe one.
    """
    if name == "cpu":
        return processor(ranks)
    if name.endswith(".json"):
        return _read(Path(name))
    if name not in DEVICES:
        raise unknown("device", name, [*DEVICES, "cpu", "FILE.json"])
    return DEVICES[name]


def here() -> str | None:
    """The name in the table of this machine's first GPU as its driver lists it; None where there is none."""
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", file.read_text(), re.MULTILINE)
        found = of_driver(model[1]) if model else None
        return found.name if found else None
    return None


def _read(path: Path) -> Device:
    """A device from a JSON file: peak in FLOP/s, memory and host_memory in bytes, bandwidth, link, host in bytes/s.

    Raises:
        InputError: it cannot be read, lacks a field or has one too many, or a number is not positive.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--gpu {path}: cannot be read as JSON: {error}") from None
    numbers = ("peak", "memory", "bandwidth", "link", "host", "watts", "per_node", "host_memory")
    wanted = {"name": path.stem, "words": path.stem, "source": str(path)}
    expected = [field.name for field in fields(Device)]
    if not isinstance(found, dict) or not set(numbers) <= set(found) or not set(found) <= set(expected):
        raise InputError(
            f"--gpu {path}: must be an object with {', '.join(numbers)} and nothing but {', '.join(wanted)} beside them"
        )
    for key in numbers:
        if isinstance(found[key], bool) or not isinstance(found[key], int | float) or not 0 < found[key] < math.inf:
            raise InputError(f"--gpu {path}: {key} = {found[key]!r}: must be a positive number, in units of 1")
    return Device(**{**wanted, **found})
