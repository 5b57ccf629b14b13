"""`--parallel.layout auto` on the machine that trains: the planner's choice for the ranks and devices that are here."""

import sys
from dataclasses import replace

from configs.errors import InputError
from configs.schema import Run


def laid_out(run: Run, world: int = 0, local: int = 0) -> Run:
    """The run with the layout that the planner chooses, if it asks for that; else as it is.

    Args:
        world: ranks that an outside launcher has started; 0: as many as fit this machine.
        local: those of them on this machine.

    Raises:
        InputError: the device is not in the planner's table, or no layout fits, with what would.
    """
    if run.parallel.layout == "pinned":
        return run
    from data_pipeline.stream import open_data
    from trainer import cluster
    from trainer.planning import auto, beside
    from trainer.planning.data_set import Size

    world = world or cluster.local_ranks(auto.open_layout(run))
    dataset = open_data(run)
    size = Size(dataset.split("train").samples, dataset.classes, str(dataset.root))
    name = device_name(run)
    machines = beside.machines_of(name, world, local or world)
    if machines is None:
        raise InputError(f"parallel.layout = 'auto': the planner does not know {name}; nearest valid: 'pinned'")
    found = auto.advise(run, size, machines)
    sys.stderr.write(f"layout: {found.words}, chosen for {machines}\n")
    return replace(found.run, cluster=replace(run.cluster, ranks=run.cluster.ranks or (0 if local else world)))


def device_name(run: Run) -> str:
    """What this machine's devices call themselves."""
    from trainer import cluster

    if cluster.device_kind(run) == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(0)
