"""`coatnet doctor`: what of this machine, this node or this cluster will make a run fail, and what to do about it."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs import resolve
from configs.errors import InputError
from configs.finding import Finding, page, rows, worst
from configs.schema import Run
from trainer.commands.status import run_folder

if TYPE_CHECKING:
    from slurm.preflight import Needs

DOCTOR_USAGE = """usage: coatnet doctor [RUN] [--cluster PROFILE] [--json]
       coatnet doctor --node RUN [--json]
       coatnet doctor --links RUN [--json]

Looks at what a run depends on, says what it found and what to do about it: versions, devices, an all-reduce over the
devices here, the speed of the disks, compilers, DeepSpeed's operators and FFCV. With RUN, a run folder, also its data,
and whether its settings ask for something that is missing.

--cluster PROFILE  also the cluster: requeue, preemption, grace and time limits beside the time that RUN's saves took
--node RUN         this node alone, as the supervisor does on every node of a job before the ranks start: clock, disks,
                   shared memory, code and data, versions; where the run is on GPUs their number, memory errors and
                   speed in a bf16 matrix product
--links RUN        one such process on every node of a job: an all-reduce between pairs of nodes, in two rounds of
                   different pairs, so that a slow one is found, then over all of them

exit codes: 0 nothing bad; 1 something is; 76 wrong words"""


def doctor_command(arguments: list[str]) -> int:
    """`coatnet doctor ...`: returns the exit code.

    Raises:
        InputError: wrong words, no run folder of that name, no profile of that name.
    """
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(DOCTOR_USAGE + "\n")
        return 0
    folder, profile, options = _parse(arguments)
    run = resolve.recorded(folder / "run.json") if folder is not None else None
    if "--node" in options or "--links" in options:
        assert run is not None
        assert folder is not None
        found = examine_node(run, folder) if "--node" in options else examine_links(run)
    else:
        found = examine_machine(run, folder, profile)
    sys.stdout.write((json.dumps(rows(found)) if "--json" in options else page(found)) + "\n")
    return 1 if worst(found) == "bad" else 0


def _parse(arguments: Sequence[str]) -> tuple[Path | None, str | None, set[str]]:
    """The run folder, the cluster's profile, the other options.

    Raises:
        InputError: see `doctor_command`.
    """
    words, names, options, profile = list(arguments), [], set(), None
    while words:
        word = words.pop(0)
        if word == "--cluster":
            if not words:
                raise InputError("coatnet doctor --cluster: wants the name of a profile, or a path")
            profile = words.pop(0)
        elif word in ("--json", "--node", "--links"):
            options.add(word)
        elif word.startswith("-"):
            raise InputError(f"coatnet doctor: {word} is no option; see `coatnet doctor --help`")
        else:
            names.append(word)
    alone = options & {"--node", "--links"}
    if len(names) > 1 or len(alone) > 1 or (alone and (not names or profile is not None)):
        raise InputError(f"coatnet doctor takes one run folder, not {' '.join(arguments)}; see `coatnet doctor --help`")
    return run_folder(names[0]) if names else None, profile, options


def examine_machine(run: Run | None, folder: Path | None, profile: str | None) -> list[Finding]:
    """All findings about this machine, and about the cluster where a profile is named."""
    from slurm import clusters, preflight, settings
    from trainer.machine import doctor
    from trainer.machine.reach import data

    known = clusters.load(profile) if profile is not None else None
    found = doctor.versions() + doctor.devices() + doctor.matmuls() + doctor.collectives(doctor.local_world())
    found += preflight.disk("runs", str(folder or ("runs" if Path("runs").is_dir() else ".")), 0, 64 << 20)
    found += preflight.disk("scratch", tempfile.gettempdir(), 1 << 30, 64 << 20)
    found += [preflight.clock(0.0), preflight.shared_memory(shared_bytes(run) if run else 0), *doctor.builds(run)]
    if run is not None:
        found.append(data(run))
    if known is not None:
        found += settings.findings(known, _save_seconds(folder))
    return found


def examine_node(run: Run, folder: Path) -> list[Finding]:
    """The findings about this node of a job; what must be the same on all nodes is printed as well."""
    from slurm import preflight
    from trainer.machine.reach import data

    needs = node_needs(run, folder)
    print(preflight.FACTS + json.dumps(preflight.facts(needs)), flush=True)
    found = preflight.examine(needs)
    if not run.data.synthetic:
        found.append(data(run))
    if needs.gpus:
        from trainer.machine import doctor  # imports torch

        found += doctor.devices() + doctor.matmuls()
    return found


def node_needs(run: Run, folder: Path) -> "Needs":
    """What a run wants from a node."""
    from models import cost, spec
    from slurm import preflight

    parameters = cost.count(spec.of(run.model), run.model.resolution).parameters
    copies = 4 if run.optim.ema else 3  # weights, two moments, the average
    ranks = int(os.environ.get("COATNET_RANKS", "1"))
    gpus = ranks if run.cluster.device == "cuda" or os.path.exists("/dev/nvidia0") else 0
    return preflight.Needs(
        folder=str(folder),
        scratch=run.data.cache or os.environ.get("COATNET_CACHE") or tempfile.gettempdir(),
        code=str(Path(__file__).resolve().parents[2]),
        free_bytes=2 * 4 * copies * parameters,  # the next one is written before an older one is deleted
        shm_bytes=ranks * shared_bytes(run),
        gpus=gpus if run.cluster.device != "cpu" else 0,
        asked_at=float(os.environ.get("COATNET_ASKED_AT", "0")),
    )


def shared_bytes(run: Run) -> int:
    """Bytes of the batches that one rank's loader has on their way: two a worker, and the one in use."""
    batch = (run.parallel.micro_batch or min(run.data.global_batch, 256)) * 3 * run.model.resolution**2
    return (2 * run.data.workers + 1) * batch


def examine_links(run: Run) -> list[Finding]:
    """The findings about the links between the nodes of a job, of which this is one."""
    from trainer.machine import doctor, links

    node, nodes = os.environ.get("SLURM_PROCID", "0"), os.environ.get("SLURM_NTASKS", "1")
    ranks = int(os.environ.get("COATNET_RANKS", "0")) or doctor.local_world()
    if nodes == "1":
        return doctor.collectives(ranks)
    meet = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    variables = {links.NODE: node, links.NODES: nodes, links.MEET: meet}
    variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "")  # not the loopback of one machine
    return doctor.collectives(ranks, variables)


def _save_seconds(folder: Path | None) -> float | None:
    """Seconds of the slowest of a run's saves, None where there is none."""
    from slurm import settings
    from trainer.tracking.track import events

    happened = events(folder) if folder is not None else []
    return settings.save_seconds([event for event in happened if event.get("event") == "save"])
