r"""Cluster profiles: small TOML files with what differs between clusters and never belongs into code.

`~/.config/coatnet/clusters/NAME.toml`, or a path. All keys are optional:

    partition = "gpu"
    account = "vision"
    qos = "high"
    constraint = "h100"
    time = "3-00:00:00"
    gpus = true                    # false: a cluster of processors
    gpu = "h100"                   # which, for the planner: a name of `coatnet plan --gpu`, or a file
    gpu_option = "gpus_per_node"   # or "gres", for clusters without --gpus-per-node
    interface = "ib0"              # NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME
    container = "apptainer exec --nv /images/coatnet.sif"
    srun = "--cpu-bind=cores"
    python = "/opt/venvs/coatnet/bin/python"
    host_python = "python3"        # runs the supervisor on the nodes, 3.9 or newer
    setup = ["module load cuda"]   # shell lines before the supervisor
    notify = "curl -s -d \"$COATNET_EVENT $COATNET_RUN\" https://example.org/hook"
    requeue = true                 # false where jobs may not queue themselves again: use --chain
    cpus_per_rank = 12             # cores of a task
    preflight = "/opt/site/check"  # succeeds on a fit node, in place of `coatnet doctor --node`; "true": no check
    signal_seconds = 300           # before the time limit, when the ranks are asked to save
    grace_seconds = 120            # that they have for it, before their stacks are written and they are killed
    crashes = 3                    # failures without a newer checkpoint between them, after which the run is given up
    pause_seconds = 30             # after the second of them, four times as long after the third
    start_seconds = 1800           # until the first steps: imports, data, compilation
    hang_seconds = 45              # without progress between steps, or 4 times the 99th percentile step
    slow_seconds = 900             # the same while a rank waits for data, saves or evaluates
    [environment]
    NCCL_IB_TIMEOUT = "22"
    [sbatch]                       # any other option of sbatch
    exclusive = true
"""

import shlex
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from configs.errors import InputError, unknown

COUNTS = (
    "cpus_per_rank", "signal_seconds", "grace_seconds", "crashes", "pause_seconds", "start_seconds", "hang_seconds",
    "slow_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """A cluster's own settings; see the module's text."""

    name: str = "default"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    time: str = ""
    gpus: bool = True
    gpu: str = ""
    gpu_option: str = "gpus_per_node"
    interface: str = ""
    container: str = ""
    srun: str = ""
    python: str = ""
    host_python: str = "python3"
    setup: tuple[str, ...] = ()
    notify: str = ""
    requeue: bool = True
    cpus_per_rank: int = 0
    preflight: str = ""
    signal_seconds: int = 300
    grace_seconds: int = 120
    crashes: int = 3
    pause_seconds: int = 30
    start_seconds: int = 1800
    hang_seconds: int = 45
    slow_seconds: int = 900
    environment: dict[str, str] = field(default_factory=dict)
    sbatch: dict[str, Any] = field(default_factory=dict)


def folder() -> Path:
    """Where named profiles lie."""
    return Path.home() / ".config" / "coatnet" / "clusters"


def load(name: str) -> Profile:
    """The profile of a name or a path; an empty name gives one without any settings.

    Raises:
        InputError: no such profile, a key that does not exist, or a value of another type.
    """
    if not name:
        return Profile()
    path = Path(name) if name.endswith(".toml") or "/" in name else folder() / f"{name}.toml"
    if not path.is_file():
        known = sorted(file.stem for file in folder().glob("*.toml"))
        if known:
            raise unknown("cluster profile", name, known)
        raise InputError(f"cluster profile {name!r}: {path} does not exist; `coatnet cluster init` writes a first one")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cluster profile {path}: cannot be read: {error}") from None
    return parse({"name": path.stem, **content}, str(path))


def parse(content: dict[str, Any], where: str) -> Profile:
    """A profile from its keys.

    Raises:
        InputError: see `load`.
    """
    known = {item.name: item for item in fields(Profile)}
    plain = Profile()
    for key, value in content.items():
        if key not in known:
            raise InputError(f"cluster profile {where}: {unknown('key', key, known)}")
        wanted = type(getattr(plain, key))
        given = tuple if isinstance(value, list) else type(value)
        if given is not wanted:
            raise InputError(f"cluster profile {where}: {key} = {value!r}: must be a {wanted.__name__}")
    for key in ("setup",):
        if not all(isinstance(line, str) for line in content.get(key, ())):
            raise InputError(f"cluster profile {where}: {key}: must be a list of lines")
    if content.get("gpu_option", "gpus_per_node") not in ("gpus_per_node", "gres"):
        raise InputError(f"cluster profile {where}: gpu_option = {content['gpu_option']!r}: gpus_per_node or gres")
    for key in COUNTS:
        if content.get(key, 0) < 0:
            raise InputError(f"cluster profile {where}: {key} = {content[key]}: must be at least 0; nearest valid: 0")
    for key in ("container", "srun", "preflight"):
        try:
            shlex.split(content.get(key, ""))
        except ValueError as error:
            raise InputError(f"cluster profile {where}: {key} = {content[key]!r}: {error}") from None
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    values["environment"] = {key: str(value) for key, value in content.get("environment", {}).items()}
    return Profile(**values)
