"""The supervisor and the scheduler, with ranks that train nothing: what each ending of a job leads to."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from slurm import clusters, job, scheduler, submit
from tests.slurm.lab import Lab
from tests.slurm.runs import ROOT, lines

pytestmark = pytest.mark.slurm
PROFILE = clusters.Profile(
    partition="low", gpus=False, time="10", signal_seconds=30, grace_seconds=10, pause_seconds=0, hang_seconds=20,
    preflight="true", sbatch={"exclusive": True},
)  # fmt: skip
REQUEST = submit.Request("light", (2,), 1)


class Light:
    """One run of `tests.slurm.light`, or an array or a chain of them."""

    def __init__(self, lab: Lab, base: Path, steps: int = 15, mode: str = "", elements: int = 1) -> None:
        self.lab, self.steps, self.mode, self.base = lab, steps, mode, base
        self.folders = [base / f"run{number}" for number in range(elements)]
        self.jobs: list[str] = []

    def submit(self, profile: clusters.Profile = PROFILE, request: submit.Request = REQUEST) -> "Light":
        """Send it."""
        place = self.base / "submitit"
        place.mkdir()
        for number, folder in enumerate(self.folders):
            folder.mkdir()
            command = ["tests.slurm.light", str(folder), str(self.steps), self.mode]
            job.write(submit.describe(folder, command, request, profile, ROOT), place / f"job-{number}.json")
        self.jobs = submit.send(place, ROOT, request, profile, len(self.folders))
        for number, folder in enumerate(self.folders):
            mine = [self.jobs[number]] if len(self.folders) > 1 else self.jobs
            submit.note(folder, mine, request, ROOT, place)
        return self

    def rows(self, element: int = 0) -> list[dict[str, object]]:
        """The steps that were made."""
        return lines(self.folders[element] / "steps.jsonl")

    def until(self, step: int, element: int = 0, hurry: bool = False) -> None:
        """Wait for a step."""
        self.lab.until(lambda: len(self.rows(element)) >= step, f"step {step}", hurry=hurry)

    def decisions(self, element: int = 0) -> list[str]:
        """What the supervisor did."""
        found = lines(self.folders[element] / "events" / "agent.jsonl")
        return [row["action"] for row in found if row["event"] == "decide"]

    def told(self) -> str:
        """What is written into the run's folder about all that the supervisor did."""
        path = self.folders[0] / "events" / "agent.jsonl"
        return path.read_text() if path.exists() else ""

    def log(self) -> str:
        """The supervisor's own log."""
        return "".join(path.read_text() for path in self.base.glob("submitit/*_log.*"))

    def ends(self, state: str, job: str = "", hurry: bool = True) -> None:
        """Wait for a job's last state."""
        wanted = job or self.jobs[0]

        def another() -> str:
            now = self.lab.state(wanted)
            return f"it is {now}:\n{self.log()}" if scheduler.over(now) and now != state else ""

        self.lab.until(lambda: self.lab.state(wanted) == state, f"{wanted} {state}", another, hurry)


@pytest.fixture
def light(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Light]:
    """A light run; SLURM's commands of this process talk to the cluster."""
    for name in ("SLURM_CONF", "LAB"):
        monkeypatch.setenv(name, lab.environment[name])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield Light(lab, tmp_path)
    lab.heal()


def test_a_crash_loop_gives_up_with_the_real_exit_code(light: Light) -> None:
    light.mode = "never starts"
    light.submit(replace(PROFILE, notify='echo "$COATNET_EVENT" >>"$COATNET_RUN/told"'))
    light.ends("FAILED")
    assert light.decisions() == ["again", "again", "again", "finish"]
    assert "ExitCode=9:0" in light.lab.ask("scontrol", "-o", "show", "job", light.jobs[0])
    assert (light.folders[0] / "told").read_text().split() == ["start", "fault", "fault", "fault", "give-up"]


def test_a_cancelled_job_stays_cancelled(light: Light) -> None:
    light.submit().until(3)
    light.lab.ask("scancel", light.jobs[0])
    light.ends("CANCELLED")
    assert light.decisions() == ["leave"]
    made = len(light.rows())
    light.lab.node("hurry")
    time.sleep(3)
    assert light.lab.state(light.jobs[0]) == "CANCELLED"
    assert len(light.rows()) == made < light.steps
    assert scheduler.live(light.folders[0]) == []


def test_an_array_s_element_is_queued_again_alone(light: Light, lab: Lab, tmp_path: Path) -> None:
    both = Light(lab, tmp_path / "both", steps=25, elements=2)
    both.base.mkdir()
    both.submit()
    both.until(3, element=1)
    lab.ask("scancel", "--batch", "--signal=USR2", both.jobs[1])
    both.ends("COMPLETED", both.jobs[1])
    both.ends("COMPLETED", both.jobs[0])
    assert both.decisions(0) == ["finish"]
    assert both.decisions(1) == ["requeue", "finish"]
    assert [row["step"] for row in both.rows(1)] == list(range(1, 26))
    assert len({row["try"] for row in both.rows(1)}) == 2


def test_a_chain_goes_on_where_a_job_may_not_queue_itself_again(light: Light) -> None:
    light.submit(replace(PROFILE, requeue=False), replace(REQUEST, chain=3)).until(3)
    assert scheduler.live(light.folders[0]) == light.jobs
    light.lab.ask("scancel", "--batch", "--signal=USR2", light.jobs[0])
    for name, state in zip(light.jobs, ("FAILED", "COMPLETED", "COMPLETED"), strict=True):
        light.ends(state, name, hurry=False)
    assert light.decisions() == ["finish", "finish"]  # the third left before it tried
    assert [row["step"] for row in light.rows()] == list(range(1, light.steps + 1))


def test_a_bad_node_is_found_before_the_ranks_start(light: Light) -> None:
    bad = light.lab.ask("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split()[0]
    light.submit(replace(PROFILE, preflight=f'test "$(hostname)" != {bad}'))
    light.ends("COMPLETED")
    assert light.decisions() == ["requeue", "finish"]
    tries = [row for row in lines(light.folders[0] / "events" / "agent.jsonl") if row["event"] == "try"]
    assert len(tries) == 1
    assert bad not in tries[0]["nodes"]


def test_a_job_takes_what_is_free_each_time_and_uses_what_divides(light: Light) -> None:
    words = ["sbatch", "--parsable", "-p", "main", "-N1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 99"]
    other = light.lab.ask(*words)
    light.steps = 25
    light.submit(request=replace(REQUEST, node_counts=(1, 2, 4))).until(3)
    light.lab.ask("scancel", other)
    light.lab.ask("scancel", "--batch", "--signal=USR2", light.jobs[0])
    light.ends("COMPLETED")
    tries = [row for row in lines(light.folders[0] / "events" / "agent.jsonl") if row["event"] == "try"]
    assert [len(row["nodes"]) for row in tries] == [2, 4]  # of the three that were free first


def test_a_slow_node_is_left_out_where_fewer_are_faster(light: Light) -> None:
    light.mode = "slow"
    light.submit(request=replace(REQUEST, node_counts=(1, 2)))
    light.ends("COMPLETED")
    first, second = [
        row["nodes"] for row in lines(light.folders[0] / "events" / "agent.jsonl") if row["event"] == "try"
    ]
    assert second == first[:1] != first


def test_a_supervisor_that_fails_lives_again(light: Light) -> None:
    """A file is in its way, which is gone when the job has been queued again."""
    in_the_way = light.folders[0] / "heartbeat"
    light.submit(replace(PROFILE, setup=(f'[ -n "${{SLURM_RESTART_COUNT:-}}" ] || touch {in_the_way}',)))
    light.lab.until(lambda: "the supervisor failed" in light.told(), "its decision")
    assert "Error" in light.log()
    in_the_way.unlink()
    light.ends("COMPLETED")


def test_nodes_that_the_user_excludes_stay_excluded(light: Light) -> None:
    idle = light.lab.ask("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split()
    profile = replace(PROFILE, preflight=f'test "$(hostname)" != {idle[1]}', sbatch={"exclude": idle[0]})
    light.submit(profile, replace(REQUEST, node_counts=(1,)))
    light.ends("COMPLETED")
    told = light.lab.ask("scontrol", "-o", "show", "job", light.jobs[0])
    assert f"ExcNodeList={idle[0]},{idle[1]}" in told or f"ExcNodeList=n[{idle[0][1:]}-{idle[1][1:]}]" in told
    assert light.decisions() == ["requeue", "finish"]


def test_the_time_limit_queues_the_job_again(light: Light) -> None:
    light.steps = 10_000
    light.submit(replace(PROFILE, time="2", signal_seconds=55)).until(3)
    light.ends("PENDING", hurry=False)
    assert light.decisions() == ["requeue"]
    light.lab.ask("scancel", light.jobs[0])


def test_ranks_that_hear_nothing_are_ended_after_their_grace(light: Light) -> None:
    light.mode, light.steps = "deaf", 10_000
    light.submit().until(3)
    light.lab.ask("scancel", "--batch", "--signal=USR2", light.jobs[0])
    light.ends("PENDING", hurry=False)
    assert light.decisions() == ["requeue"]
    told = [row for row in lines(light.folders[0] / "events" / "agent.jsonl") if row["event"] == "hung"]
    assert "did not leave within 10 s" in told[0]["why"]


def test_a_node_whose_power_is_cut(light: Light) -> None:
    light.steps = 10_000
    light.submit().until(3)
    first = light.rows()[-1]["try"]
    nodes = next(row for row in lines(light.folders[0] / "events" / "agent.jsonl") if row["event"] == "try")["nodes"]
    light.lab.node("kill", nodes[1])
    light.lab.until(lambda: light.rows()[-1]["try"] != first, "steps on other nodes", hurry=True)
    tries = [row for row in lines(light.folders[0] / "events" / "agent.jsonl") if row["event"] == "try"]
    assert nodes[1] not in tries[-1]["nodes"]
    assert [row["step"] for row in light.rows()] == list(range(1, len(light.rows()) + 1))


def test_the_job_s_description_is_all_that_is_kept_as_a_pickle(light: Light) -> None:
    light.submit()
    pickled = next((light.base / "submitit").glob("*_submitted.pkl"))
    assert pickled.stat().st_size < 2000
    assert json.loads((light.base / "submitit" / "job-0.json").read_text())["folder"] == str(light.folders[0])
    light.ends("COMPLETED")
    assert os.listdir(light.folders[0] / "logs")
