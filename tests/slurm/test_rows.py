"""Every way in which SLURM and machines end a run's ranks, each with the real trainer: it goes on to the same end.

After each the losses, the gradient norms and the last checkpoint's tensors are those of an undisturbed run bit by bit,
and the data cursor has left behind as many samples. `make slow-slurm`; how soon each is noticed and how soon a step is
made again goes into the record `slurm-recovery`.
"""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.conftest import Make, equal
from tests.slurm.runs import ROOT, Tiny
from tests.slurm.strike.sitecustomize import HANG, HANG_IN_C, RAISE

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
Measured = Callable[..., None]
Undisturbed = Callable[..., Tiny]
STEPS = 60
AT = 9  # the step after which something strikes


def begun(run: Tiny, more: str = "", environment: str = "") -> Tiny:
    """Submit a run and wait until it trains."""
    run.submit(run.profile(more=more, environment=environment))
    run.until_step(AT)
    return run


@pytest.mark.parametrize(
    ("what", "number"),
    [(RAISE, 1), (signal.SIGKILL, 0), (signal.SIGKILL, 1)],
    ids=["raises", "is killed, the first one", "is killed"],
)
def test_a_rank(what: int, number: int, tiny: Make, undisturbed: Undisturbed, measured: Measured) -> None:
    run = begun(tiny(steps=STEPS))
    struck = run.strike(number, what)
    run.until_done()
    assert run.decisions() == ["again", "finish"]
    assert run.events("ended")[0]["code"] == (1 if what == RAISE else 137)
    if what == RAISE:
        assert "RuntimeError: a fault, on purpose" in run.log()
    equal(run, undisturbed(steps=STEPS))
    measured(run, struck)


@pytest.mark.parametrize(
    ("what", "number"),
    [(HANG, 1), (HANG_IN_C, 0), (signal.SIGSTOP, 1)],
    ids=["in Python", "the first one, in C with the GIL", "stopped"],
)
def test_a_rank_hangs(what: int, number: int, tiny: Make, undisturbed: Undisturbed, measured: Measured) -> None:
    run = begun(tiny(steps=STEPS))
    struck = run.strike(number, what)
    run.until_done()
    assert run.decisions() == ["again", "finish"]
    [hung] = run.events("hung")
    assert hung["ranks"] == [number]
    place = {HANG: "hang", HANG_IN_C: "hang_in_c", signal.SIGSTOP: "gave no stack"}[what]
    assert place in hung["named"]
    assert any(call.startswith("gloo:") for call in hung["collectives"])
    equal(run, undisturbed(steps=STEPS))
    measured(run, struck)


def test_the_time_limit(tiny: Make, measured: Measured) -> None:
    """The scheduler's signal comes a minute early, or up to two."""
    run = tiny(steps=1200)
    run.submit(run.profile(), "--time", "3")
    run.lab.until(lambda: run.decisions() == ["requeue"], "the end of the first life")
    [ended] = run.events("ended")
    assert (ended["code"], ended["asked"]) == (75, "time")
    struck = ended["time"]
    run.lab.ask("scontrol", "update", f"JobId={run.jobs[0]}", "TimeLimit=30")
    last = max(run.losses())
    run.until_step(last + 1, struck)
    assert min(row["step"] for row in run.rows() if row["time"] > struck) == last + 1
    assert run.command("cancel", str(run.folder)).code == 0
    made = run.losses()
    other = tiny("undisturbed", steps=1200)
    other.submit(other.profile())
    other.until_step(max(made))
    whole = other.losses()
    assert made == {step: whole[step] for step in made}
    measured(run, struck)


def test_the_known_end_of_the_job(tiny: Make, undisturbed: Undisturbed, measured: Measured) -> None:
    """The ranks stop by themselves, before any signal comes: the job ends in less than a save is taken to need."""
    run = tiny(steps=STEPS, words=("--cluster.end-time", ""))
    run.submit(run.profile(), "--time", "3")
    run.lab.until(lambda: run.decisions() == ["requeue"], "the end of the first life")
    [ended] = run.events("ended")
    assert (ended["code"], ended["asked"]) == (75, "")
    run.lab.ask("scontrol", "update", f"JobId={run.jobs[0]}", "TimeLimit=30")
    run.until_done()
    equal(run, undisturbed(steps=STEPS))
    measured(run)


def test_the_end_comes_while_the_first_rank_is_stuck(tiny: Make, undisturbed: Undisturbed, measured: Measured) -> None:
    run = begun(tiny(steps=STEPS), more="hang_seconds = 600")
    run.strike(0, HANG_IN_C)
    run.lab.ask("scancel", "--batch", "--signal=USR2", run.jobs[0])
    struck = time.time()
    run.until_done()
    assert run.decisions() == ["requeue", "finish"]
    [hung] = run.events("hung")
    assert "did not leave within 20 s" in hung["why"]
    assert "rank 0 on " in hung["named"]
    assert "hang_in_c" in hung["named"]
    equal(run, undisturbed(steps=STEPS))
    measured(run, struck)


@pytest.mark.parametrize(
    ("partition", "stuck"),
    [("low", False), ("lowcancel", False), ("low", True)],
    ids=["REQUEUE", "CANCEL", "REQUEUE, a rank is stuck"],
)
def test_a_preemption(partition: str, stuck: bool, tiny: Make, undisturbed: Undisturbed, measured: Measured) -> None:
    """With SLURM's default signals: TERM to the ranks only."""
    run = tiny(steps=STEPS)
    run.submit(run.profile(sbatch=f'partition = "{partition}"'))
    run.until_step(AT)
    if stuck:
        run.strike(0, signal.SIGSTOP)
    struck = run.preempt()
    run.until_done()
    assert run.decisions()[-1] == "finish"
    if not stuck:
        assert run.decisions() == ["requeue", "finish"]
        assert run.events("decide")[0]["why"] == "preempted"
    equal(run, undisturbed(steps=STEPS))
    measured(run, struck)


@pytest.mark.parametrize("place", [0, 1], ids=["of the supervisor", "of ranks only"])
def test_a_node_is_cut(place: int, tiny: Make, undisturbed: Undisturbed, measured: Measured) -> None:
    run = begun(tiny(steps=STEPS))
    node = run.events("try")[0]["nodes"][place]
    run.lab.node("kill", node)
    struck = time.time()
    run.until_done()
    assert node not in run.events("try")[-1]["nodes"]
    equal(run, undisturbed(steps=STEPS))
    measured(run, struck)


def test_a_node_hangs(tiny: Make, undisturbed: Undisturbed, measured: Measured) -> None:
    """Everything on it stops, its daemons too."""
    run = begun(tiny(steps=STEPS))
    node = run.events("try")[0]["nodes"][1]
    run.lab.node("freeze", node)
    struck = time.time()
    try:
        run.until_done()
    finally:
        run.lab.node("kill", node)
    assert node not in run.events("try")[-1]["nodes"]
    equal(run, undisturbed(steps=STEPS))
    measured(run, struck)


def test_a_bad_node(tiny: Make, undisturbed: Undisturbed, measured: Measured) -> None:
    run = tiny(steps=STEPS)
    bad = run.lab.ask("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split()[0]
    run.submit(run.profile(more=f"preflight = '''test \"$(hostname)\" != {bad}'''"))
    run.until_done()
    assert run.decisions() == ["requeue", "finish"]
    assert bad in run.events("preflight")[0]["bad"]
    equal(run, undisturbed(steps=STEPS))
    measured(run)


def test_a_crash_loop(tiny: Make, measured: Measured) -> None:
    run = tiny(steps=STEPS)
    run.submit(run.profile(environment='STRIKE_ALWAYS = "1"'))
    run.lab.until(lambda: run.state() == "FAILED", "the end")
    assert run.decisions() == ["again", "again", "again", "finish"]
    assert run.events("decide")[-1]["code"] == 3
    assert "ExitCode=3:0" in run.lab.ask("scontrol", "-o", "show", "job", run.jobs[0])
    measured(run)


def test_a_cancelled_run(tiny: Make, undisturbed: Undisturbed, measured: Measured) -> None:
    """scancel saves and ends it; submitted again it goes on."""
    run = begun(tiny(steps=STEPS))
    run.lab.ask("scancel", run.jobs[0])
    run.lab.until(lambda: run.state() == "CANCELLED", "the end")
    assert run.decisions() == ["leave"]
    made = max(run.losses())
    run.submit(run.profile())
    run.until_done()
    assert min(row["step"] for row in run.rows() if row["time"] > run.events("try")[-1]["time"]) == made + 1
    equal(run, undisturbed(steps=STEPS))
    measured(run)


def test_an_array(tiny: Make, undisturbed: Undisturbed, measured: Measured) -> None:
    """One element is queued again, the other is not touched; each ends as it would alone."""
    sweep = tiny(steps=STEPS)
    outcome = sweep.submission(sweep.profile(), "--array", "seed=0,1")
    assert outcome.code == 0, outcome.said
    runs = [tiny(f"run-seed{seed}", steps=STEPS) for seed in (0, 1)]
    for number, run in enumerate(runs):
        run.jobs = [f"{outcome.said.split()[1].partition('_')[0]}_{number}"]
        run.until_step(AT)
    assert runs[1].command("requeue", str(runs[1].folder)).code == 0
    for run in runs:
        run.until_done()
    assert [run.decisions() for run in runs] == [["finish"], ["requeue", "finish"]]
    for seed, run in enumerate(runs):
        equal(run, undisturbed(steps=STEPS, words=("--seed", str(seed))))
    measured(runs[1])


def test_a_chain(tiny: Make, undisturbed: Undisturbed, measured: Measured) -> None:
    run = tiny(steps=STEPS)
    run.submit(run.profile(more="requeue = false"), "--chain", "3")
    run.until_step(AT)
    assert run.command("requeue", str(run.folder)).code == 0
    run.until_done()
    assert [run.lab.state(job) for job in run.jobs] == ["FAILED", "COMPLETED", "COMPLETED"]
    assert run.decisions() == ["finish", "finish"]
    equal(run, undisturbed(steps=STEPS))
    measured(run)


def test_an_edit_while_the_job_waits(tiny: Make, undisturbed: Undisturbed, measured: Measured, tmp_path: Path) -> None:
    """The job was submitted from a tree that is broken before it starts, and stays broken while it is queued again."""
    tree = tmp_path / "tree"
    for room in ("configs", "models", "data_pipeline", "trainer", "slurm", "tests"):
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    run = tiny(steps=STEPS, tree=tree)
    block = ["sbatch", "-p", "main", "-N4", "--exclusive", "--job-name", "blocks", "-o", "/dev/null"]
    run.lab.ask(*block, "--wrap", "sleep 600")
    run.submit(run.profile())
    assert run.state() == "PENDING"
    for path in (tree / "trainer" / "cli.py", tree / "trainer" / "train.py", tree / "slurm" / "agent.py"):
        path.write_text("raise SystemExit('edited')\n")
    subprocess.run(["scancel", "--name=blocks"], env=run.environment, check=True)
    run.until_step(AT)
    assert run.command("requeue", str(run.folder)).code != 0  # the tree is broken, and this command is of it
    run.lab.ask("scancel", "--batch", "--signal=USR2", run.jobs[0])
    run.until_done()
    equal(run, undisturbed(steps=STEPS))
    measured(run)
