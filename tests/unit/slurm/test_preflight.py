"""A node's own checks, on this machine and on what broken ones say; and how an odd node among many is found."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from configs.finding import Finding, page, worst
from slurm import nodes, preflight
from slurm.preflight import FACTS, Needs

GOOD_GPU = "NVIDIA H100 80GB HBM3, 0, No, No\n"


@pytest.fixture
def needs(tmp_path: Path, repository: Path) -> Needs:
    return Needs(str(tmp_path / "run"), str(tmp_path / "scratch"), str(repository), asked_at=time.time())


def test_this_machine_is_fit(needs: Needs) -> None:
    found = preflight.examine(needs)
    assert worst(found) in ("good", "note", "warning"), page(found)
    assert {finding.name for finding in found} == {"clock", "run folder", "scratch", "shared memory", "code"}
    assert not list(Path(needs.folder).iterdir())  # what the speed was measured with is gone


@pytest.mark.parametrize(
    ("change", "name", "word"),
    [
        ({"free_bytes": 10**18}, "run folder", "are needed"),
        ({"scratch_bytes": 10**18}, "scratch", "are needed"),
        ({"shm_bytes": 10**18}, "shared memory", "--ipc=host"),
        ({"folder": "/proc/no/such"}, "run folder", "/proc/no/such"),
        ({"code": "/nowhere"}, "code", "all nodes share"),
        ({"asked_at": 4e9}, "clock", "behind"),
        ({"asked_at": 1e9}, "clock", "ahead"),
        ({"gpus": 8}, "GPUs", "nvidia-smi does not answer"),
    ],
)
def test_an_unfit_node_is_told_by(change: dict[str, object], name: str, word: str, needs: Needs) -> None:
    found = preflight.examine(replace(needs, **change))  # type: ignore[arg-type]
    bad = [finding for finding in found if finding.level == "bad"]
    assert [finding.name for finding in bad] == [name]
    assert word in bad[0].said + bad[0].advice
    assert bad[0].advice


@pytest.mark.parametrize(
    ("told", "level", "word"),
    [
        (GOOD_GPU * 8, "good", "x 8"),
        (GOOD_GPU * 7, "bad", "7 of 8"),
        (GOOD_GPU * 7 + "NVIDIA H100 80GB HBM3, 3, No, No\n", "bad", "GPU 7: 3 uncorrected"),
        (GOOD_GPU * 7 + "NVIDIA H100 80GB HBM3, 0, Yes, No\n", "bad", "could not be remapped"),
        (GOOD_GPU * 7 + "NVIDIA H100 80GB HBM3, 0, No, Yes\n", "warning", "wait to be remapped"),
        ("NVIDIA GeForce RTX 4090, [N/A], [N/A], [N/A]\n" * 8, "good", "RTX 4090"),
        (None, "bad", "does not answer"),
    ],
)
def test_what_nvidia_smi_says(told: str | None, level: str, word: str) -> None:
    found = preflight.gpus(8, told)
    assert worst(found) == level
    assert word in page(found)


def report(**facts: str) -> str:
    return f"ok  something\n{FACTS}{json.dumps(facts)}\nhealthy\n"


def test_the_node_that_differs_is_named_with_how() -> None:
    hosts = [f"n{number}" for number in range(5)]
    reports = {host: report(torch="2.14.1", code="abc") for host in hosts}
    assert preflight.odd(reports, hosts) == {}
    reports["n1"] = report(torch="2.13.0", code="abc")
    reports["n3"] = report(code="abd")
    assert preflight.odd(reports, hosts) == {
        "n1": "torch is 2.13.0, elsewhere 2.14.1",
        "n3": "code is abd, elsewhere abc; torch is none, elsewhere 2.14.1",
    }
    reports["n4"] = "no facts at all"
    assert set(preflight.odd(reports, hosts)) == {"n1", "n3"}


def test_of_two_nodes_the_first_is_right() -> None:
    reports = {"n2": report(torch="2.14.1"), "n1": report(torch="2.13.0")}
    assert set(preflight.odd(reports, ["n1", "n2"])) == {"n2"}
    assert set(preflight.odd(reports, ["n2", "n1"])) == {"n1"}


def test_the_codes_digest_follows_its_files(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("a = 1\n")
    before = preflight.code_digest(str(tmp_path))
    (tmp_path / "room" / "note.txt").write_text("not code")
    assert preflight.code_digest(str(tmp_path)) == before
    (tmp_path / "room" / "a.py").write_text("a = 2\n")
    assert preflight.code_digest(str(tmp_path)) != before


def test_a_page_has_what_to_do_below_each_finding() -> None:
    shown = page([Finding("a", "good", "fine"), Finding("b", "bad", "broken", "mend it")])
    assert shown == "ok       a: fine\nBAD      b: broken\n         -> mend it"


def test_a_node_gives_its_bad_findings_as_the_reason() -> None:
    text = "note     clock: no time server\nBAD      shared memory: 64 MB free\n         -> --ipc=host\nunhealthy"
    assert nodes.reason(text) == "shared memory: 64 MB free"
    assert nodes.reason("bash: line 1: coatnet: command not found\nunhealthy") == (
        "bash: line 1: coatnet: command not found"
    )
    assert nodes.reason("") == "no answer"
