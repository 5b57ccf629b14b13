"""On a real cluster: a first profile, its settings beside a save, nodes that check themselves, a build as an array."""

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from configs import resolve
from data_pipeline.building.build import BUILD
from data_pipeline.manifest import open_dataset
from slurm import clusters, discover, nodes, preflight, scheduler, settings, tasks
from slurm.clusters import Profile
from tests.slurm.lab import Lab
from trainer.commands.config import resolve_command
from trainer.commands.train import write_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
PROFILE = 'gpus = false\npython = "{python}"\ntime = "10"\n[environment]\nGLOO_SOCKET_IFNAME = "lo"\n'


@pytest.fixture
def cluster(lab: Lab, monkeypatch: pytest.MonkeyPatch, repository: Path) -> Lab:
    """The cluster, as this process's commands find it."""
    monkeypatch.setenv("SLURM_CONF", lab.environment["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", str(repository))
    return lab


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "lab.toml"
    path.write_text(PROFILE.format(python=sys.executable))
    return path


def coatnet(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "trainer.cli", *words], capture_output=True, text=True, timeout=300)


def test_a_first_profile_of_this_cluster(cluster: Lab) -> None:
    known = {one.name: one for one in discover.partitions()}
    assert known["main"].default
    assert known["main"].nodes == 4
    found = clusters.parse({"name": "lab", **tomllib.loads(discover.first_profile())}, "lab")
    assert (found.partition, found.gpus, found.requeue) == ("main", True, True)
    told = discover.compose([known["lowcancel"]], {}, {"PreemptMode": "CANCEL", "GraceTime": "0"}, [], [])
    assert "requeue = false" in told


def test_the_settings_of_this_cluster_beside_a_save(cluster: Lab) -> None:
    found = {finding.name: finding for finding in settings.findings(Profile(partition="low", gpus=False), 20.0)}
    assert found["preemption"].level == "warning"  # GraceTime 10
    assert "GraceTime 10 s" in found["preemption"].said
    assert found["scancel"].level == "note"  # KillWait 5
    assert found["time to save"].level == "good"
    assert found["GPUs"].level == "warning"  # fake ones, which gpus = false leaves idle
    missing = settings.findings(Profile(partition="nowhere"), None)
    assert [finding.level for finding in missing] == ["good", "bad"]
    assert tasks.most_elements() == 1000
    assert "MaxArraySize" in scheduler.ask("scontrol", "show", "config")


def test_nodes_check_themselves_and_an_odd_one_is_found(cluster: Lab, tmp_path: Path, repository: Path) -> None:
    """The preflight as a step of a job, on a copy of the code that one node sees changed."""
    run = resolve_command("demo-digits", ["--data.synthetic", "--runs", str(tmp_path), "--name", "run"])
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", run)
    assert resolve.recorded(tmp_path / "run" / "run.json") == run
    check = f"{sys.executable} -m trainer.cli doctor --node {tmp_path / 'run'}"
    odd = f"if [ $(hostname) = n3 ]; then echo '{preflight.FACTS}{json.dumps({'code': 'other'})}'; else {check}; fi"
    bad = f"if [ $(hostname) = n2 ]; then echo 'BAD      clock: 9.0 s behind'; false; else {check}; fi"
    for name, command in (("fit", check), ("odd", odd), ("bad", bad)):
        script = (
            f"import json, os, pathlib; from slurm import nodes; "
            f"found = nodes.unfit(['n1', 'n2', 'n3', 'n4'], [{command!r}], pathlib.Path({str(tmp_path / name)!r}), "
            f"dict(os.environ)); pathlib.Path({str(tmp_path / name)!r}).write_text(json.dumps(found))"
        )
        words = ["sbatch", "--parsable", "--wait", "-N4", "-t5", f"--output={tmp_path}/{name}.log"]
        (tmp_path / f"{name}.py").write_text(script)
        cluster.ask(*words, "--wrap", f"{sys.executable} {tmp_path}/{name}.py")
    found = {name: json.loads((tmp_path / name).read_text()) for name in ("fit", "odd", "bad")}
    assert found["fit"] == {}, found
    assert set(found["odd"]) == {"n3"}
    assert "code is other, elsewhere" in found["odd"]["n3"]
    assert found["bad"] == {"n2": "clock: 9.0 s behind"}
    assert nodes.GOOD in (tmp_path / "fit.n1").read_text()
    assert preflight.code_digest(str(repository)) in (tmp_path / "fit.n4").read_text()


def test_a_data_set_is_built_by_an_array(cluster: Lab, tmp_path: Path, profile: Path) -> None:
    """One picture is damaged while the tasks run first; then the same command goes on, to the same data set as here."""
    for kind, shade in (("cats", 40), ("dogs", 200)):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for number in range(10):
            picture = Image.new("RGB", (40 + number, 40), (shade, 5 * number, 90))
            picture.save(tmp_path / "pictures" / kind / f"{number}.png")
    words = ["data", "build", str(tmp_path / "pictures"), "--shard-samples", "4", "--heldout", "0.2"]
    done = coatnet(*words, "--out", str(tmp_path / "here"))
    assert done.returncode == 0, done.stderr
    out = ["--out", str(tmp_path / "there")]
    assert coatnet("data", "plan", *words[2:], *out, "--tasks", "2").returncode == 0
    victim = tmp_path / "pictures" / "cats" / "7.png"
    content, times = victim.read_bytes(), victim.stat()
    for damaged in (True, False):
        victim.write_bytes(bytes(len(content)) if damaged else content)
        os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
        done = coatnet(*words, *out, "--cluster", str(profile), "--wait")
        assert "submitted 2 tasks as job" in done.stdout, done.stderr
        assert done.returncode == (76 if damaged else 0), done.stderr
        if damaged:
            assert "FAILED" in done.stderr
            assert "7.png" in done.stderr
    here, there = open_dataset(tmp_path / "here"), open_dataset(tmp_path / "there")
    assert {name: split.fingerprint for name, split in here.splits.items()} == {
        name: split.fingerprint for name, split in there.splits.items()
    }


def test_tasks_that_reach_their_time_limit_go_on(cluster: Lab, tmp_path: Path, profile: Path) -> None:
    """SLURM's signal comes while both tasks wait for a picture; each has written a shard before."""
    for number in range(24):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (40 + number, 40), (200, 5 * number, 90)).save(tmp_path / "pictures" / f"{number}.png")
    held, released = threading.Event(), threading.Event()

    class Slow(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(0.2)
            if held.is_set():
                released.wait(60)
            super().do_GET()

    handler = functools.partial(Slow, directory=str(tmp_path / "pictures"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines = [f"http://127.0.0.1:{server.server_address[1]}/{number}.png,{number % 2}" for number in range(24)]
        (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]) + "\n")
        words = ["data", "build", str(tmp_path / "list.csv"), "--shard-samples", "3", "--heldout", "0.4"]
        done = coatnet(*words, "--out", str(tmp_path / "here"))
        assert done.returncode == 0, done.stderr
        out = tmp_path / "there"
        done = coatnet(*words, "--out", str(out), "--cluster", str(profile), "--tasks", "2")
        assert done.returncode == 0, done.stderr
        array, merge = re.findall(r"job (\d+)", done.stdout)
        records = out / BUILD / "records"
        cluster.until(lambda: all(any(records.glob(f"{name}-*")) for name in ("train", "heldout")), "a shard of each")
        held.set()
        cluster.ask("scancel", "--batch", "--signal=USR2", array)
        logs = [out.parent / "there.jobs" / f"{array}_{number}_0_log.err" for number in range(2)]
        cluster.until(lambda: all("stopped, " in log.read_text() for log in logs), "the tasks' word")
        released.set()
        held.clear()
        time.sleep(3)  # a job that starts in the moment in which it was queued again finds its credential revoked
        cluster.until(lambda: scheduler.over(*scheduler.states(merge).values()), "the merge", hurry=True)
        assert scheduler.states(merge) == {merge: "COMPLETED"}, scheduler.states(array)
        server.shutdown()
    assert all("the same command goes on there" in log.read_text() for log in logs)
    here, there = open_dataset(tmp_path / "here"), open_dataset(out)
    assert {name: split.fingerprint for name, split in here.splits.items()} == {
        name: split.fingerprint for name, split in there.splits.items()
    }


def test_more_tasks_than_an_array_takes_are_refused(cluster: Lab, tmp_path: Path, profile: Path) -> None:
    done = coatnet(
        "data", "build", str(tmp_path), "--out", str(tmp_path / "o"), "--cluster", str(profile), "--tasks", "5000"
    )
    assert done.returncode == 76
    assert "nearest valid: 1000" in done.stderr
