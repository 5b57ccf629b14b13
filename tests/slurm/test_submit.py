"""`coatnet submit` and the commands around it, as a user types them."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.slurm.conftest import Make, equal
from tests.slurm.runs import Tiny

pytestmark = pytest.mark.slurm


def test_the_dry_run_is_what_would_be_submitted(tiny: Make) -> None:
    run = tiny()
    profile = run.profile(more='qos = "normal"', sbatch='comment = "a run of ours"')
    shown = run.submission(profile, "--dry-run")
    assert shown.code == 0, shown.said
    assert not run.folder.exists()
    told = run.submission(profile, "--test-only")
    assert "to start at" in told.said
    [job] = run.submit(profile)
    sent = (run.folder / "submitit" / f"{job}_submission.sh").read_text()
    assert shown.said.strip() == sent.strip()
    for line in ("--nodes=2", "--signal=B:USR2@60", "--requeue", "--qos=normal", "--comment='a run of ours'"):
        assert f"#SBATCH {line}" in sent
    assert "exec python3" in sent


def test_a_sweep_is_one_array(tiny: Make) -> None:
    run = tiny()
    shown = run.submission(run.profile(), "--array", "optim.lr=1e-3,2e-3", "--array", "seed=1,2,3", "--dry-run")
    assert "#SBATCH --array=0-5%6" in shown.said


@pytest.mark.parametrize(
    ("profile", "words", "theirs", "ours"),
    [
        ({"more": 'account = "nobody"', "sbatch": 'partition = "gold"'}, (), "nvalid partition", "`sinfo -s` lists"),
        ({}, ("--nodes", "9", "--data.global-batch", "288"), "not available", "fewer with --nodes"),
        ({"sbatch": 'gres = "gpu:99"'}, (), "not available", "see `gpus`"),
    ],
)
def test_refusals_come_in_the_scheduler_s_words_and_ours(
    profile: dict[str, str], words: tuple[str, ...], theirs: str, ours: str, tiny: Make
) -> None:
    run = tiny()
    for more in ((), ("--test-only",)):
        outcome = run.submission(run.profile(**profile), *words, *more)
        assert outcome.code == 76
        assert theirs in outcome.said
        assert ours in outcome.said
    assert "Traceback" not in outcome.said


def test_a_run_is_submitted_once_cancelled_and_goes_on(tiny: Make, undisturbed: Callable[..., Tiny]) -> None:
    run = tiny(steps=60)
    profile = run.profile()
    [first] = run.submit(profile)
    second = run.submission(profile)
    assert second.code == 76
    assert f"job {first} of this run waits or runs already" in second.said
    run.until_step(5)
    follows = subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", "logs", "-f", str(run.folder)],
        env=run.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "asked to save and leave" in run.command("cancel", str(run.folder)).said
    run.lab.until(lambda: run.state() == "FAILED", "the job's end")
    assert run.decisions() == ["finish"]
    assert run.events("decide")[-1]["code"] == 75
    said, _ = follows.communicate(timeout=60)  # it ends with the job
    assert "stopped on request at step" in said
    assert "finish: stopped on request and saved" in said
    assert not run.reached(60)
    assert "no job waits or runs" in run.command("cancel", str(run.folder)).said
    [again] = run.submit(profile)
    run.until_done()
    assert again != first
    equal(run, undisturbed(steps=60))
    assert "the run is finished" in run.submission(profile).said


def test_a_check_says_whether_it_fits_and_how_fast(tiny: Make) -> None:
    run = tiny()
    outcome = run.submission(run.profile(), "--check")
    assert outcome.code == 0, outcome.said
    assert "it fits:" in outcome.said
    assert "images/s" in outcome.said
    assert list(run.folder.parent.glob("run-check-*"))


def test_a_check_of_what_cannot_run_says_why(tiny: Make) -> None:
    run = tiny()
    outcome = run.submission(run.profile(), "--check", "--model.attention", "flex")
    assert outcome.code == 76
    assert "it does not run: bad input" in outcome.said
    assert "torch trains it on CUDA only" in outcome.said
