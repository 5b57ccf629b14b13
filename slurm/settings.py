"""A cluster's settings that decide what becomes of a run's state, beside the time that a save takes.

From `scontrol show config` and `scontrol show partition`; each finding says what to change, in the profile or with the
people who run the cluster.
"""

import re
from collections.abc import Mapping

from configs.errors import InputError
from configs.finding import Finding
from slurm import scheduler
from slurm.clusters import Profile

MARGIN = 30.0  # seconds that are kept free beside the saves, see trainer/health/stopping.py
FORGETS = 60  # seconds after which a finished job may be forgotten too soon for `coatnet status`


def findings(profile: Profile, save: float | None) -> list[Finding]:
    """All findings about the cluster.

    Args:
        profile: of the cluster.
        save: seconds that a save takes until it is on disk; None: not measured.

    Raises:
        InputError: the scheduler does not answer.
    """
    version = scheduler.ask("scontrol", "--version")
    config = parse_config(scheduler.ask("scontrol", "show", "config"))
    found = [Finding("SLURM", "good", f"{version}, cluster {config.get('ClusterName', 'without a name')}")]
    partition = scheduler.partition_of(profile.partition)
    if not partition:
        said = f"there is no partition {profile.partition!r}" if profile.partition else "there is no default partition"
        return [*found, Finding("partition", "bad", said, "`sinfo -s` lists them; set `partition` in the profile")]
    return found + judge(profile, config, partition, save)


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config` as a table."""
    pairs = (line.partition("=")[::2] for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def judge(
    profile: Profile, config: Mapping[str, str], partition: Mapping[str, str], save: float | None
) -> list[Finding]:
    """The findings that settings give; see `findings`."""
    found = [_requeue(profile, config), _preemption(config, partition, save), *_signal(profile, save)]
    found += _cancel(config, save)
    found += [_limit(profile, partition), _gpus(profile, partition), _accounting(config)]
    down = seconds(config.get("SlurmdTimeout", ""))
    if down:
        said = f"a node that dies is noticed after {down:.0f} s (SlurmdTimeout)"
        found.append(Finding("node loss", "good" if down <= 300 else "note", said))
    return found


def _requeue(profile: Profile, config: Mapping[str, str]) -> Finding:
    """Whether a job may be queued again."""
    if not profile.requeue:
        return Finding("requeue", "note", "the profile forbids it", "give --chain N, so that later jobs go on")
    if config.get("JobRequeue") == "0":
        said = "JobRequeue is 0: jobs are queued again only if they ask for it, which ours do"
        advice = "if yours are not, set requeue = false in the profile and give --chain N"
        return Finding("requeue", "note", said, advice)
    return Finding("requeue", "good", "jobs are queued again after a lost node, a preemption, the time limit")


def _preemption(config: Mapping[str, str], partition: Mapping[str, str], save: float | None) -> Finding:
    """What a preemption leaves of a run."""
    mode = partition.get("PreemptMode") or config.get("PreemptMode", "OFF")
    grace = float(partition.get("GraceTime") or 0)
    if config.get("PreemptType", "").endswith("none") or mode == "OFF":
        return Finding("preemption", "good", "jobs of this partition are not preempted")
    said = f"PreemptMode {mode}, GraceTime {grace:.0f} s"
    if mode.startswith("SUSPEND"):
        return Finding("preemption", "warning", said, "a suspended job holds its GPUs' memory; ask for REQUEUE")
    need = save if save is not None else 0.0
    if grace <= need:
        takes = f"a save takes {save:.0f} s" if save is not None else "how long a save takes is not measured"
        advice = "ask for a longer GraceTime; else what was done since the last save is lost: --checkpoint.every less"
        if mode == "CANCEL":
            advice += "; a job cancelled without a grace time does not come back: --chain N"
        return Finding("preemption", "warning", f"{said}; {takes}", advice)
    return Finding("preemption", "good", f"{said}: the ranks save on its signal" + _beside(save))


def _signal(profile: Profile, save: float | None) -> list[Finding]:
    """Whether the ranks are asked early enough, and have long enough."""
    if save is None:
        said = f"asked {profile.signal_seconds} s before the time limit; how long a save takes is not measured"
        return [Finding("time to save", "note", said, "coatnet doctor RUN compares with a run's own saves")]
    need, found = MARGIN + 2 * save, []
    if profile.signal_seconds < need:
        said = f"asked {profile.signal_seconds} s before the time limit, too late for two saves of {save:.0f} s"
        found.append(Finding("time to save", "bad", said, f"signal_seconds = {need:.0f} in the profile"))
    if profile.grace_seconds < 2 * save:
        said = f"the supervisor waits {profile.grace_seconds} s for a save of {save:.0f} s"
        found.append(Finding("time to save", "bad", said, f"grace_seconds = {2 * save + 10:.0f} in the profile"))
    if not found:
        said = f"asked {profile.signal_seconds} s before the time limit, {profile.grace_seconds} s to leave"
        found.append(Finding("time to save", "good", said + _beside(save)))
    return found


def _cancel(config: Mapping[str, str], save: float | None) -> list[Finding]:
    """Whether a job that scancel ends can save."""
    wait = seconds(config.get("KillWait", ""))
    if save is None or not wait:
        return []
    said = f"KillWait {wait:.0f} s lie between scancel's TERM and its KILL{_beside(save)}"
    if wait < save:
        return [Finding("scancel", "note", said, "coatnet cancel RUN saves first, however long that takes")]
    return [Finding("scancel", "good", said)]


def _limit(profile: Profile, partition: Mapping[str, str]) -> Finding:
    """The time limit beside the partition's."""
    most, wanted = seconds(partition.get("MaxTime", "UNLIMITED")), seconds(profile.time)
    if most and wanted > most:
        said = f"time = {profile.time}, the partition allows {partition['MaxTime']}"
        return Finding("time limit", "bad", said, f'time = "{partition["MaxTime"]}" in the profile')
    said = (
        f"the partition allows {partition.get('MaxTime', 'any')}, the profile asks for {profile.time or 'the default'}"
    )
    return Finding("time limit", "good", said)


def _gpus(profile: Profile, partition: Mapping[str, str]) -> Finding:
    """Whether the partition has what the profile counts on."""
    has = "gres/gpu" in partition.get("TRES", "")
    name = partition.get("PartitionName", "")
    if profile.gpus and not has:
        said = f"SLURM knows of no GPUs in partition {name}"
        advice = "gpus = false in the profile for a cluster of processors, or another partition"
        return Finding("GPUs", "warning", said, advice)
    if not profile.gpus and has:
        return Finding("GPUs", "warning", f"partition {name} has GPUs, which gpus = false leaves idle", "gpus = true")
    return Finding("GPUs", "good", f"partition {name}: {partition.get('TRES') or 'processors'}")


def _accounting(config: Mapping[str, str]) -> Finding:
    """How long the scheduler remembers a job."""
    kept = seconds(config.get("MinJobAge", ""))
    if config.get("AccountingStorageType", "").endswith("none"):
        said = f"no accounting: a job is forgotten {kept:.0f} s after its end"
        return Finding("accounting", "note", said, "coatnet status then tells from the run folder alone")
    if kept < FORGETS:
        return Finding("accounting", "note", f"MinJobAge {kept:.0f} s: finished jobs are looked up by sacct")
    return Finding("accounting", "good", f"{config.get('AccountingStorageType')}, MinJobAge {kept:.0f} s")


def _beside(save: float | None) -> str:
    return f"; a save takes {save:.0f} s" if save is not None else ""


def seconds(text: str) -> float:
    """SLURM's ways to write a time, in seconds: 300 sec, 2-00:00:00, 01:30:00, 30 (minutes); 0 for none or endless."""
    word = text.split()[0] if text.split() else ""
    if "sec" in text or "min" in text:
        return float(word) * (60 if "min" in text else 1)
    if not re.fullmatch(r"(\d+-)?\d+(:\d+)*", word):
        return 0.0
    days, _, clock = word.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        parts = [*parts, 0, 0][:3]  # days-hours[:minutes[:seconds]]
    elif len(parts) == 1:
        parts = [0, parts[0], 0]
    elif len(parts) == 2:
        parts = [0, *parts]
    return int(days or 0) * 86400.0 + parts[0] * 3600 + parts[1] * 60 + parts[2]


def save_seconds(saves: list[dict[str, object]]) -> float | None:
    """Seconds of the slowest of a run's saves until it was on disk, from its events; None without any."""
    times = [float(str(event.get("stall", 0))) + float(str(event.get("write", 0))) for event in saves]
    return max(times) if times else None


def require_slurm(where: str) -> None:
    """Refuse where no job can be submitted.

    Raises:
        InputError: SLURM's commands are missing or it does not answer.
    """
    try:
        scheduler.ask("scontrol", "ping", patience=30.0)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
