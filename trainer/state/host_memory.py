"""The host's memory for a copy of a rank's state, and how much of it there is."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from trainer.cluster import local_world
from trainer.state.snapshot import Snapshot

SHARE = 0.9  # of what is free, that a copy may take at most
GROUPS = Path("/sys/fs/cgroup")
# Of a control group, version 2 and 1: the limit, what is used, and of the latter what is only a cache of files.
FILES = {
    "": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


@dataclass
class HostMemory:
    """Room for one copy of this rank's state, kept from one save to the next.

    The pages of fresh memory cost more than the copy. Pinned where the state lies on a GPU, which then copies by itself
    and several times faster.

    Attributes:
        device: where the state lies.
    """

    device: torch.device
    _room: dict[str, Tensor] = field(default_factory=dict)

    def reserve(self, snapshot: Snapshot) -> str:
        """Make room; returns why there is none, or nothing."""
        sizes = {kind: sum(part.numel() for part in parts) for kind, parts in snapshot.kinds.items()}
        missing = {
            kind: size for kind, size in sizes.items() if kind not in self._room or len(self._room[kind]) != size
        }
        for kind in missing:
            self._room.pop(kind, None)
        # Linux hands out memory that it does not have, and later kills who uses it. All ranks of a machine ask at once.
        types = {kind: parts[0].dtype if parts else torch.float32 for kind, parts in snapshot.kinds.items()}
        needed = sum(size * types[kind].itemsize for kind, size in missing.items()) * local_world()
        free = available_bytes()
        if needed > SHARE * free:
            return f"a copy of the state takes {needed / 1e9:.2f} GB of host memory and {free / 1e9:.2f} are free"
        try:
            for kind, size in missing.items():
                self._room[kind] = torch.empty(size, dtype=types[kind], pin_memory=self.device.type == "cuda")
        except (RuntimeError, MemoryError) as error:
            self._room.clear()
            return f"no host memory for a copy of the state ({str(error).partition(chr(10))[0]})"
        return ""

    def mark(self) -> "torch.cuda.Event | None":
        """What the device still has to do before the state is as the calling thread sees it; None on a processor."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def copy(self, snapshot: Snapshot, after: "torch.cuda.Event | None" = None) -> Snapshot:
        """The same snapshot in host memory; valid until the next copy. Any thread may call it.

        On a GPU it is made in a stream of its own, beside the passes that follow. Nothing may change the state then.

        Args:
            after: of `mark`, called where the snapshot was taken.
        """
        if after is None:
            return self._copied(snapshot)
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream(self.device)):  # type: ignore[no-untyped-call]
            stream = torch.cuda.current_stream()
            stream.wait_event(after)
            copied = self._copied(snapshot)
            stream.synchronize()
        return copied

    @torch.no_grad()
    def _copied(self, snapshot: Snapshot) -> Snapshot:
        """`copy` in the current stream; on a GPU it may still be under way."""
        kinds: dict[str, list[Tensor]] = {}
        for kind, parts in snapshot.kinds.items():
            room, place = self._room[kind], 0
            for part in parts:
                room[place : place + part.numel()].copy_(part, non_blocking=True)
                place += part.numel()
            kinds[kind] = [room]
        buffers = {name: buffer.detach().to("cpu", copy=True) for name, buffer in snapshot.buffers.items()}
        return replace(snapshot, kinds=kinds, buffers=buffers)


def available_bytes(groups: Path = GROUPS, process: Path = Path("/proc/self/cgroup")) -> int:
    """Memory that this process could still take: what is free on the machine, and what its control groups leave."""
    machine = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]
    left = [int(machine) * 1024]
    for line in process.read_text().splitlines() if process.exists() else ():
        _, controllers, path = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind in FILES:
            root = groups / kind
            own = root / path.lstrip("/")  # in a container the path may be the host's: then the root is the own group
            left += [free for folder in (own, *own.parents) if (free := _free(folder, kind)) is not None]
    return min(left)


def _free(folder: Path, kind: str) -> int | None:
    """What a control group has left; None where there is no limit or no such group."""
    limit, used, caches = FILES[kind]
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(most) - int((folder / used).read_text()) + sum(int(rows.get(name, 0)) for name in caches)
    except (OSError, ValueError):
        return None
