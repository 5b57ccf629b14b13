"""Which nodes hold the others up: what the run's guard told of ranks that compute slower than the rest.

Python 3.9 and the standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

OFTEN = 3  # verdicts of one try that make a node slow: a single one may be a neighbour's fault


def slow_hosts(events: Path, since: int, hosts: Sequence[str]) -> dict[str, float]:
    """Hosts of ranks that the guard found slow, and how many times as long they computed at the least.

    Args:
        events: the first rank's.
        since: bytes of the file that are older than the try.
        hosts: of the ranks, in their order.
    """
    try:
        with events.open("rb") as file:
            file.seek(since)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, list[float]] = {}
    for line in lines:
        if '"slow_rank"' not in line:
            continue
        try:
            event = json.loads(line)
            named, times = [int(rank) for rank in event["rank"]], float(event["times"])
        except (ValueError, KeyError, TypeError):
            continue  # half written when the rank was killed
        for host in {hosts[rank] for rank in named if rank < len(hosts)}:
            found.setdefault(host, []).append(times)
    return {host: min(values) for host, values in found.items() if len(values) >= OFTEN}


def chosen(hosts: Sequence[str], slow: dict[str, float], counts: Sequence[int]) -> list[str]:
    """The hosts to use, in their order: as many as the batch can be divided over, without slow ones if that is faster.

    A run goes as fast as its slowest node: n nodes of which one takes f times as long do the work of n / f.

    Args:
        hosts: that are there.
        slow: hosts that take longer, and how many times.
        counts: numbers of nodes that are possible; none of them fits: all hosts are used.
    """

    def work(names: Sequence[str]) -> float:
        return len(names) / max((slow.get(name, 1.0) for name in names), default=1.0)

    best: list[str] = []
    by_speed = sorted(hosts, key=lambda name: slow.get(name, 1.0))
    for count in sorted(counts):
        if count <= len(hosts):
            names = by_speed[:count]
            if work(names) >= work(best):
                best = names
    return [name for name in hosts if name in best] if best else list(hosts)
