"""A first profile of a cluster, from what sinfo, scontrol and sacctmgr say; everything in it is meant to be edited."""

import getpass
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from slurm import scheduler, settings

NICS = ("ib", "hsn", "bond", "eth", "en")  # names of interfaces, the quickest kinds first


@dataclass(frozen=True)
class Partition:
    """A line of sinfo.

    Attributes:
        gpus: of a node, 0 for none.
        features: what `constraint` can name.
    """

    name: str
    default: bool
    up: bool
    limit: str
    nodes: int
    gpus: int
    features: tuple[str, ...]


def partitions() -> list[Partition]:
    """The cluster's partitions, those with several kinds of nodes by their best one.

    Raises:
        InputError: the scheduler does not answer, or has none.
    """
    told = scheduler.ask("sinfo", "-h", "-e", "-o", "%P|%a|%l|%D|%G|%f")
    found: dict[str, Partition] = {}
    for line in told.splitlines():
        name, up, limit, nodes, gres, features = line.split("|", 5)
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))
        own = tuple(word for word in features.split(",") if word and word != "(null)")
        plain = name.rstrip("*")
        one = Partition(plain, name.endswith("*"), up == "up", limit, int(nodes), gpus, own)
        if plain not in found or one.gpus > found[plain].gpus:
            found[plain] = one
    if not found:
        raise InputError("sinfo lists no partition; `sinfo -s` shows what this account may see")
    return list(found.values())


def choose(known: Sequence[Partition]) -> Partition:
    """The partition to begin with: up, with GPUs, the default one, with many nodes, in this order."""
    return max(known, key=lambda one: (one.up, one.gpus > 0, one.default, one.nodes))


def accounts() -> list[str]:
    """The accounts that this user may charge; none where there is no accounting."""
    try:
        told = scheduler.ask("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=Account")
    except InputError:
        return []
    return sorted({line.strip() for line in told.splitlines() if line.strip()})


def interfaces(folder: Path = Path("/sys/class/net")) -> list[str]:
    """Network interfaces of this machine that a cluster's traffic may use, the quickest kinds first."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    kinds = [[name for name in sorted(names) if name.startswith(kind)] for kind in NICS]
    return [name for kind in kinds for name in kind]


def first_profile() -> str:
    """The text of a profile.

    Raises:
        InputError: the scheduler does not answer.
    """
    known = partitions()
    config = settings.parse_config(scheduler.ask("scontrol", "show", "config"))
    return compose(known, config, scheduler.partition_of(choose(known).name), accounts(), interfaces())


def compose(
    known: Sequence[Partition],
    config: dict[str, str],
    partition: dict[str, str],
    charged: Sequence[str],
    nics: Sequence[str],
) -> str:
    """The text of a profile, from what was found out."""
    chosen = choose(known)
    mode = partition.get("PreemptMode") or config.get("PreemptMode", "OFF")
    grace = float(partition.get("GraceTime") or 0)
    comes_back = not (mode == "CANCEL" and grace == 0)
    lines = [
        f"# Cluster {config.get('ClusterName', '')}, by `coatnet cluster init`. Edit it; keys: slurm/clusters.py",
        f'partition = "{chosen.name}"  # of ' + ", ".join(_described(one) for one in known),
    ]
    if charged:
        lines.append(f'account = "{charged[0]}"  # yours: {", ".join(charged)}')
    else:
        lines.append('# account = ""  # if jobs must name one')
    if chosen.features:
        lines.append(f'# constraint = "{chosen.features[0]}"  # features: {", ".join(chosen.features)}')
    if chosen.limit not in ("infinite", "UNLIMITED", "n/a"):
        lines.append(f'time = "{chosen.limit}"  # the most that the partition allows')
    else:
        lines.append('time = "1-00:00:00"  # the partition has no limit; a run goes on in the next job')
    lines.append(f"gpus = {str(chosen.gpus > 0).lower()}" + (f"  # {chosen.gpus} on a node" if chosen.gpus else ""))
    if nics:
        lines.append(f'# interface = "{nics[0]}"  # on this machine: {", ".join(nics)}; the nodes may differ')
    lines.append(f'python = "{sys.executable}"')
    told = f"PreemptMode {mode}, GraceTime {grace:.0f} s, JobRequeue {config.get('JobRequeue', '?')}"
    lines.append(f"requeue = {str(comes_back).lower()}  # {told}" + ("" if comes_back else ": give --chain N"))
    lines.append(
        "signal_seconds = 300  # before the time limit; `coatnet doctor RUN --cluster NAME` compares with its saves"
    )
    return "\n".join(lines) + "\n"


def _described(one: Partition) -> str:
    """A partition in a comment."""
    parts = [f"{one.nodes} nodes", *([f"{one.gpus} GPUs each"] if one.gpus else []), *([] if one.up else ["down"])]
    return f"{one.name} ({', '.join(parts)})"
