"""How fast ranks exchange data: every node with two others in turn, then all of them at once.

`python -m trainer.machine.links OUT` is one rank; `coatnet doctor` starts them. A node that is slow with both of its
partners is slow itself: its partners are quick with their other one. The figure is the bus bandwidth of an all-reduce,
2 (n - 1) / n times the bytes over the time, which does not depend on the number of ranks n on even links.
"""

import json
import os
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

SIZES = {"nccl": 1 << 28, "gloo": 1 << 23}  # bytes of an all-reduce
REPEATS = {"nccl": 10, "gloo": 3}
PATIENCE = 120.0  # seconds that a collective may wait: a node that is gone ends the check
SLOW = 0.5  # of the median pair: a link below that is broken, not busy
# Variables where there are several nodes: number of this one, how many there are, host:port where they meet.
NODE, NODES, MEET = "COATNET_NODE", "COATNET_NODES", "COATNET_MEET"


def pairs(nodes: int) -> list[list[tuple[int, int]]]:
    """Two rounds in which every node has two different partners, but for one that is left over; one round for two."""
    if nodes < 2:
        return []
    even = [(first, first + 1) for first in range(0, nodes - 1, 2)]
    odd = [(first, (first + 1) % nodes) for first in range(1, nodes - nodes % 2, 2)]
    return [even, odd] if nodes > 2 else [even]


def slow_nodes(speeds: dict[tuple[int, int], float]) -> list[int]:
    """Nodes that are slow with all of their partners, where others are not; none where there is one pair only.

    Args:
        speeds: of pairs of nodes, in bytes per second.
    """
    if len(speeds) < 2:
        return []
    limit = SLOW * statistics.median(speeds.values())
    partners: dict[int, list[int]] = {}
    best: dict[int, float] = {}
    for (first, second), speed in speeds.items():
        for node, other in ((first, second), (second, first)):
            partners.setdefault(node, []).append(other)
            best[node] = max(best.get(node, 0.0), speed)
    slow = {node for node, speed in best.items() if speed < limit}
    # Of an odd number two nodes meet a single partner: theirs is the fault only if he is quick with another one.
    return sorted(node for node in slow if len(partners[node]) > 1 or partners[node][0] not in slow)


def bandwidth(group: dist.ProcessGroup | None, device: torch.device, backend: str) -> float:
    """Bus bandwidth of an all-reduce over a group, bytes per second. A collective call."""
    ranks = dist.get_world_size(group)
    data = torch.ones(SIZES[backend] // 4, device=device)
    seconds = []
    for number in range(REPEATS[backend] + 2):
        began = time.perf_counter()
        dist.all_reduce(data, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number > 1:  # the first ones open connections
            seconds.append(time.perf_counter() - began)
        data.fill_(1.0)
    return 2 * (ranks - 1) / ranks * SIZES[backend] / statistics.median(seconds)


def measure(node: int, nodes: int, local: int, local_world: int) -> dict[str, object]:
    """What this job's links do; the same on all ranks.

    Returns:
        {"backend", "ranks", "all": bytes/s, "pairs": [[node, node, bytes/s], ...], "slow": [nodes]}.
    """
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    index = local % max(1, torch.cuda.device_count())
    device = torch.device("cuda", index) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    patience, world = timedelta(seconds=PATIENCE), nodes * local_world
    meet, rank = os.environ.get(MEET), node * local_world + local
    dist.init_process_group(backend, f"tcp://{meet}" if meet else None, patience, world, rank)
    control = dist.new_group(backend="gloo", timeout=patience)
    assert isinstance(control, dist.ProcessGroup)
    speeds: dict[tuple[int, int], float] = {}
    for one_round in pairs(nodes):
        mine, group = -1, control
        for number, pair in enumerate(one_round):
            ranks = [member * local_world + each for member in pair for each in range(local_world)]
            made = dist.new_group(ranks, timeout=patience)  # on every rank, in the same order
            if node in pair:
                assert isinstance(made, dist.ProcessGroup)
                mine, group = number, made
        told = torch.zeros(len(one_round), dtype=torch.float64)
        if mine >= 0:
            told[mine] = bandwidth(group, device, backend)
        least = torch.where(told == 0, torch.inf, told)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=control)
        speeds |= {pair: float(least[number]) for number, pair in enumerate(one_round)}
    whole = torch.tensor([bandwidth(None, device, backend) if world > 1 else 0.0], dtype=torch.float64)
    dist.all_reduce(whole, op=dist.ReduceOp.MIN, group=control)
    dist.barrier(group=control)
    dist.destroy_process_group()
    table = [[*pair, speed] for pair, speed in speeds.items()]
    return {"backend": backend, "ranks": world, "all": float(whole), "pairs": table, "slow": slow_nodes(speeds)}


def main(out: str) -> None:
    """Be one rank; the first one of each node writes what was found to the file `out`."""
    place = {name: int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    node, nodes = int(os.environ.get(NODE, "0")), int(os.environ.get(NODES, "1"))
    found = measure(node, nodes, place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"])
    if place["LOCAL_RANK"] == 0:
        Path(out).write_text(json.dumps({"node": node, **found}), encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1])
