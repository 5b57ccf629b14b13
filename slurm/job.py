"""What a batch job is told: paths and words in a JSON file that `coatnet submit` writes and the supervisor reads.

Python 3.9 and the standard library only, as everything the supervisor needs: it runs on the host, outside containers.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from slurm.beat import LEAST


@dataclass(frozen=True)
class Job:
    """How one run is started, watched and recovered.

    Attributes:
        folder: the run's.
        code: where the code of the run lies, a copy that later edits do not reach.
        python: the interpreter of the ranks, inside `container` if there is one.
        command: module and arguments of a rank, after `python -m`.
        ranks_per_node: tasks that are started on each node, one per device.
        node_counts: numbers of nodes that the global batch allows, largest first; empty: whatever the job was given.
        cpus_per_rank: cores of a task, 0 for what srun gives.
        container: words before the ranks' command, such as `apptainer exec --nv image.sif`.
        srun: more options for srun.
        preflight: words of a command that is run once on each node before the ranks; empty: none.
        links: words of a second one, which runs on all nodes at once and measures what lies between them; empty: none.
        notify: command line that is run on start, fault, give-up and done, with COATNET_EVENT and COATNET_RUN set.
        environment: variables of the ranks.
        requeue: whether the job may ask for itself to be queued again; else it ends with 75 and a later job of its
            chain goes on.
        crashes: failures without progress between them, after which the run is given up.
        pause: seconds to wait after the second failure without progress, four times as long after the third: what
            failed may be away for a moment.
        first_beat: seconds until the first sign of life of a step: imports, data, building the network, compilation.
        beat: seconds without progress after which a run counts as hung, at least; see `slurm.beat`.
        slow: the same while a rank waits for data, saves or evaluates.
        grace: seconds that ranks have to save and leave once they were asked to.
    """

    folder: str
    code: str
    python: str
    command: list[str]
    ranks_per_node: int = 1
    node_counts: list[int] = field(default_factory=list)
    cpus_per_rank: int = 0
    container: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    preflight: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    notify: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    requeue: bool = True
    crashes: int = 3
    pause: float = 30.0
    first_beat: float = 1800.0
    beat: float = LEAST
    slow: float = 900.0
    grace: float = 120.0

    @property
    def state(self) -> Path:
        """The supervisor's own folder in the run's."""
        return Path(self.folder) / "agent"


def read(path: str | os.PathLike[str]) -> Job:
    """The job in a file.

    Raises:
        ValueError: the file is no such description: what is missing or unknown.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    known = {item.name for item in fields(Job)}
    unknown = sorted(set(content) - known)
    missing = sorted({"folder", "code", "python", "command"} - set(content))
    if unknown or missing:
        raise ValueError(f"{path}: unknown {unknown}, missing {missing}; `coatnet submit` writes it")
    return Job(**content)


def write(job: Job, path: str | os.PathLike[str]) -> None:
    """Put a job into a file, whole or not at all."""
    write_whole(Path(path), json.dumps(asdict(job), indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Give a file new content in one step, so that who reads it sees the old or the new."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
