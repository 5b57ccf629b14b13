"""One rank of a mesh: tells where it stands and who is in its process groups.

python -m mesh_rank STAGES OUT     (RANK, WORLD_SIZE, MASTER_* set; the folder on PYTHONPATH)
"""

import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import InputError
from configs.schema import Cluster, Run
from trainer import cluster
from trainer.cluster import Member


def heard(group: dist.ProcessGroup | None, member: Member) -> list[int]:
    """The ranks that a collective of the group really reaches, in the group's order."""
    size = dist.get_world_size(group)
    ranks = [torch.zeros((), dtype=torch.int64) for _ in range(size)]
    dist.all_gather(ranks, torch.tensor(member.rank), group=group)
    return [int(rank) for rank in ranks]


def facts(member: Member) -> dict[str, Any]:
    """What this rank knows of its place."""
    team = cluster.team_group(member, 2)
    return {
        "stage": member.stage,
        "replica": member.replica,
        "replicas": member.replicas,
        "begins": member.begins,
        "ends": member.ends,
        "first": member.first,
        "data": heard(member.data_group, member),
        "pipe": heard(member.pipe_group, member) if member.pipe_group is not None else [member.rank],
        "team": heard(team, member) if member.replicas > 1 else [member.rank],
        "control": heard(member.control, member),
    }


def main(stages: str, out: str) -> None:
    """Join, stand in several meshes one after the other, write down what is seen."""
    member = cluster.join(replace(Run(), cluster=Cluster(device="cpu", timeout=60)))
    patience = timedelta(seconds=60)
    found: dict[str, Any] = {}
    for count in map(int, stages.split(",")):
        try:
            found[str(count)] = facts(cluster.in_mesh(member, count, patience))
        except InputError as error:
            found[str(count)] = str(error)
    Path(f"{out}.{member.rank}").write_text(json.dumps(found))
    cluster.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
