"""The machines of a plan: which device, how many, how they are connected. No torch."""

import math
from dataclasses import dataclass, replace

from configs.errors import at_least, require
from trainer.machine.devices import Device
from trainer.planning.rates import Rates

USABLE = 0.92  # of a GPU's memory: what its driver, fragments and other processes leave
HOST_USABLE = 0.9  # of a machine's own: the rest is the system's and the data workers'; an assumption


@dataclass(frozen=True)
class Machines:
    """Equal machines, of which a run takes `devices` devices, whole machines first.

    Ranks are numbered machine by machine, and the replicas of a pipeline stage have neighbouring ranks
    (`trainer.cluster.Member`).

    Attributes:
        device: of each rank.
        devices: ranks of the run.
        per_node: devices of one machine.
        nic: bytes/s of network for each device, one way.
    """

    device: Device
    devices: int
    per_node: int
    nic: float

    def __post_init__(self) -> None:
        at_least("--gpus", self.devices, 1)
        at_least("devices of a machine", self.per_node, 1)
        require(
            0 < self.nic < math.inf, "network of a device in bytes/s", self.nic, "must be positive and finite", 50e9
        )

    @property
    def nodes(self) -> int:
        """Machines of the run."""
        return self.across(self.devices)

    @property
    def available(self) -> float:
        """Bytes that a rank may take."""
        return self.device.memory * (1.0 if self.device.on_host else USABLE)

    @property
    def local(self) -> int:
        """Ranks of a machine, the most."""
        return min(self.devices, self.per_node)

    @property
    def host_available(self) -> float:
        """Bytes of a machine's own memory that its ranks may take together for what is kept off their devices."""
        return HOST_USABLE * self.device.host_memory

    def of(self, devices: int) -> "Machines":
        """As many devices of such machines."""
        return replace(self, devices=devices)

    def across(self, ranks: int) -> int:
        """Machines over which so many neighbouring ranks lie."""
        return -(-ranks // self.per_node)

    def bus(self, ranks: int, rates: Rates) -> float:
        """Bytes/s that a rank sends in a collective of so many neighbouring ranks.

        Between machines a ring runs over all their networks at once, and not faster than inside a machine.
        """
        if ranks <= self.per_node:
            return rates.wire
        return min(rates.wire, self.per_node * rates.network)

    def latency(self, ranks: int, rates: Rates) -> float:
        """Seconds of a collective of so many neighbouring ranks beside its bytes."""
        return rates.latency + rates.hop * (self.across(ranks) - 1)

    def pipe(self, replicas: int, rates: Rates) -> float:
        """Bytes/s from a stage of so many replicas to the next, for each pair of ranks."""
        return rates.wire if 2 * replicas <= self.per_node else min(rates.wire, rates.network)

    def __str__(self) -> str:
        """For people."""
        if self.nodes == 1:
            return f"{self.devices} x {self.device.name} in one machine"
        return (
            f"{self.devices} x {self.device.name} ({self.nodes} machines of {self.per_node}, "
            f"{self.nic * 8 / 1e9:g} Gb/s of network for each device)"
        )
