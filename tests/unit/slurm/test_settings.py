"""A cluster's settings beside the time that a save takes, and the first profile that is written from them."""

import tomllib
from typing import Any

import pytest

from configs.finding import Finding
from slurm import clusters, discover, settings
from slurm.clusters import Profile
from slurm.discover import Partition

CONFIG = """Configuration data as of 2026-11-26T02:00:00
ClusterName             = lab
JobRequeue              = 1
KillWait                = 30 sec
MinJobAge               = 300 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SlurmdTimeout           = 300 sec
AccountingStorageType   = accounting_storage/slurmdbd
"""
PARTITION = {"PartitionName": "gpu", "MaxTime": "2-00:00:00", "GraceTime": "120", "TRES": "cpu=64,gres/gpu=8"}


def judged(save: float | None, partition: dict[str, str] | None = None, **profile: Any) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    config = settings.parse_config(CONFIG)
    for finding in settings.judge(Profile(**profile), config, {**PARTITION, **(partition or {})}, save):
        found.setdefault(finding.name, []).append(finding)
    return found


def test_a_good_cluster_has_no_complaint() -> None:
    found = judged(20.0)
    assert {finding.level for findings in found.values() for finding in findings} == {"good"}


@pytest.mark.parametrize(
    ("name", "level", "word", "save", "partition", "profile"),
    [
        ("preemption", "warning", "GraceTime", 200.0, {}, {"signal_seconds": 900, "grace_seconds": 900}),
        ("preemption", "warning", "--chain N", 20.0, {"PreemptMode": "CANCEL", "GraceTime": "0"}, {}),
        ("preemption", "warning", "REQUEUE", 20.0, {"PreemptMode": "SUSPEND,GANG"}, {}),
        ("preemption", "good", "not preempted", 20.0, {"PreemptMode": "OFF"}, {}),
        ("time to save", "bad", "signal_seconds = 430", 200.0, {"GraceTime": "900"}, {"grace_seconds": 900}),
        ("time to save", "bad", "grace_seconds = 170", 80.0, {}, {}),
        ("time to save", "note", "not measured", None, {}, {}),
        ("scancel", "note", "coatnet cancel", 60.0, {}, {}),
        ("time limit", "bad", 'time = "2-00:00:00"', 20.0, {}, {"time": "3-00:00:00"}),
        ("GPUs", "warning", "gpus = false", 20.0, {"TRES": "cpu=64"}, {}),
        ("GPUs", "warning", "leaves idle", 20.0, {}, {"gpus": False}),
        ("requeue", "note", "--chain N", 20.0, {}, {"requeue": False}),
    ],
)
def test_each_complaint_says_what_to_do(
    name: str, level: str, word: str, save: float | None, partition: dict[str, str], profile: dict[str, Any]
) -> None:
    found = judged(save, partition, **profile)[name]
    assert [finding.level for finding in found] == [level]
    assert word in found[0].said + found[0].advice


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("300 sec", 300),
        ("2 min", 120),
        ("2-00:00:00", 172800),
        ("1-12", 129600),
        ("01:30:00", 5400),
        ("30:15", 1815),
        ("30", 1800),
        ("UNLIMITED", 0),
        ("infinite", 0),
        ("", 0),
        ("(null)", 0),
    ],
)
def test_slurms_times(text: str, value: float) -> None:
    assert settings.seconds(text) == value


def test_the_slowest_save_counts() -> None:
    saves: list[dict[str, object]] = [{"stall": 0.5, "write": 3.0}, {"stall": 1.0, "write": 9.0}, {"stall": 0.1}]
    assert settings.save_seconds(saves) == 10.0
    assert settings.save_seconds([]) is None


KNOWN = [
    Partition("debug", True, True, "30:00", 2, 0, ()),
    Partition("gpu", False, True, "2-00:00:00", 64, 8, ("h100", "ib")),
    Partition("gpu-old", False, False, "infinite", 512, 4, ()),
]


def test_a_first_profile_names_the_partition_with_gpus() -> None:
    text = discover.compose(KNOWN, settings.parse_config(CONFIG), PARTITION, ["vision", "other"], ["ib0", "eth0"])
    profile = clusters.parse({"name": "first", **tomllib.loads(text)}, "first")
    assert (profile.partition, profile.account, profile.time, profile.gpus) == ("gpu", "vision", "2-00:00:00", True)
    assert profile.requeue
    assert '# interface = "ib0"' in text
    assert '# constraint = "h100"' in text


def test_a_first_profile_of_a_cluster_that_cancels() -> None:
    partition = {"PartitionName": "debug", "PreemptMode": "CANCEL", "GraceTime": "0"}
    text = discover.compose(KNOWN[:1], {}, partition, [], [])
    profile = clusters.parse(tomllib.loads(text), "first")
    assert (profile.requeue, profile.gpus, profile.account) == (False, False, "")
    assert "--chain N" in text
